// CUDA's runtime library for PyTorch's build for CUDA, where there is no GPU. Streams, events, captures and graphs keep
// CUDA's rules of order, and nothing else: what has been launched is done when somebody waits for it, and of all that
// is ready, any may come next. The work itself is done on the CPU; kernels are Python's (`__init__.py`).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define ENTER                                                                                                         \
  context = (void *)(device + 1L);                                                                                    \
  Lock lock(mutex)
#define FORBIDDEN_IN_CAPTURES(stream)                                                                                 \
  if (spoils(stream))                                                                                                       \
  return fail(cudaErrorStreamCaptureUnsupported)
#define ALIVE                                                                                                         \
  if (spoilt)                                                                                                         \
  return fail(cudaErrorLaunchFailure)

typedef cudaError_t Error;
typedef std::unique_lock<std::mutex> Lock;
typedef std::function<bool()> Work; // false: the GPU is lost
typedef int (*Run)(long);

struct Node; // something launched, or recorded
typedef std::shared_ptr<Node> Ref;
struct Node {
  std::vector<Ref> after;
  Work work;
  bool begun = false, done = false;
  double at = 0;
};
struct CUgraph_st {
  std::vector<Ref> nodes;
};
struct CUgraphExec_st {
  std::vector<Ref> nodes;
};
struct Capture {
  CUgraph_st *graph;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  unsigned long long id;
  std::set<CUstream_st *> streams;
  bool broken = false;
};
struct CUstream_st {
  Ref last;
  Capture *capture = nullptr;
  std::vector<Ref> tips; // of the capture
};
struct CUevent_st {
  Ref at;
  bool captured = false, timing = true;
  unsigned long long capture = 0;
  std::vector<Ref> tips;
};

static const int BITS = 36, FIRST = 16, LAST = 1300; // an allocation has 2^36 addresses to itself
static std::mutex mutex;
static std::condition_variable changed;
static std::vector<Ref> pending;
static std::set<Capture *> captures;
static std::map<char *, size_t> blocks, pinned;
static size_t used = 0;
static const size_t total = 12ul << 30;
static unsigned long long ids = 0;
static bool working = false, spoilt = false;
static std::mt19937 any(getenv("SOFTWARE_GPU_SEED") ? atoi(getenv("SOFTWARE_GPU_SEED")) : 0);
static Run run;
static CUstream_st defaults[2];
static thread_local int device = 0;
static thread_local void *context = nullptr; // which a thread has once it has asked the runtime for something
static thread_local Error last = cudaSuccess;
static thread_local cudaStreamCaptureMode own_mode = cudaStreamCaptureModeGlobal;

static Error fail(Error error) { return last = error; }
static CUstream_st *at(cudaStream_t stream) { return stream ? stream : &defaults[device]; }

// --- doing what was launched

static bool ready(const Ref &node) {
  return !node->begun && std::all_of(node->after.begin(), node->after.end(), [](Ref &r) { return r->done; });
}

static void work_on_any(Lock &lock) {
  if (working) { // another thread's turn, which may need Python
    lock.unlock();
    auto holds = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Check");
    auto release = (void *(*)())dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    auto take = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    void *python = holds() ? release() : nullptr;
    lock.lock();
    changed.wait_for(lock, std::chrono::milliseconds(10));
    lock.unlock();
    if (python)
      take(python);
    lock.lock();
    return;
  }
  std::vector<Ref> can;
  std::copy_if(pending.begin(), pending.end(), std::back_inserter(can), ready);
  if (can.empty())
    return;
  Ref node = can[any() % can.size()];
  node->begun = working = true;
  lock.unlock();
  bool fine = !node->work || spoilt || node->work();
  lock.lock();
  spoilt |= !fine;
  node->at = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  node->done = true, working = false;
  node->after.clear(), node->work = nullptr;
  pending.erase(std::find(pending.begin(), pending.end(), node));
  changed.notify_all();
}
static void finish(Ref node, Lock &lock) {
  while (node && !node->done)
    work_on_any(lock);
}
static void finish_all(Lock &lock) {
  while (!pending.empty())
    work_on_any(lock);
}
static Ref launch(CUstream_st *stream, Work work, std::vector<Ref> after = {}) {
  Ref node = std::make_shared<Node>();
  node->work = work;
  if (stream->capture) {
    node->after = stream->tips;
    stream->capture->graph->nodes.push_back(node);
    stream->tips = {node};
    return node;
  }
  if (stream->last)
    after.push_back(stream->last);
  for (Ref &before : after)
    if (!before->done)
      node->after.push_back(before);
  pending.push_back(node);
  return stream->last = node;
}
static Error query(Ref node, Lock &lock) {
  if (!node || node->done)
    return cudaSuccess;
  work_on_any(lock); // so that it is done some time
  return cudaErrorNotReady;
}

// --- what captures forbid

static bool spoils(CUstream_st *stream) { // a call that waits, maybe for a stream, or loads, or frees
  if (stream && stream->capture)
    return stream->capture->broken = true;
  if (own_mode == cudaStreamCaptureModeRelaxed)
    return false;
  for (Capture *capture : captures) {
    bool global = capture->mode == cudaStreamCaptureModeGlobal && own_mode == cudaStreamCaptureModeGlobal;
    bool own = capture->mode != cudaStreamCaptureModeRelaxed && capture->thread == std::this_thread::get_id();
    if (global || own)
      return capture->broken = true;
  }
  return false;
}
static cudaStreamCaptureStatus status_of(CUstream_st *stream) {
  return !stream->capture          ? cudaStreamCaptureStatusNone
         : stream->capture->broken ? cudaStreamCaptureStatusInvalidated
                                   : cudaStreamCaptureStatusActive;
}

// --- for the driver, and for Python

API void **software_context() { return &context; }
API int software_spoils() {
  Lock lock(mutex);
  return spoils(nullptr);
}
API void software_start(Run function) { run = function; }
API Error software_launch(cudaStream_t stream, long id) {
  ENTER;
  ALIVE;
  launch(at(stream), [id] { return run(id) == 0; });
  return cudaSuccess;
}
API size_t software_block(char *address) { // bytes of an allocation
  Lock lock(mutex);
  auto found = blocks.find(address);
  return found == blocks.end() ? 0 : found->second;
}

// --- memory

static bool within(const std::map<char *, size_t> &memory, const void *p) {
  auto found = memory.upper_bound((char *)p);
  return found != memory.begin() && (char *)p < std::prev(found)->first + std::prev(found)->second;
}
static size_t pages(size_t size) { return (size + 4095) & ~4095ul; }

API Error cudaMalloc(void **p, size_t size) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(nullptr);
  ALIVE;
  if (used + size <= total)
    for (long n = FIRST; n < LAST; n++) {
      char *address = (char *)(n << BITS);
      int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
      if (blocks.count(address) ||
          mmap(address, pages(size), PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
        continue;
      memset(address, 0xFF, std::min(size, 64ul << 20)); // NaN
      blocks[address] = size, used += size, *p = address;
      return cudaSuccess;
    }
  return fail(cudaErrorMemoryAllocation);
}
API Error cudaFree(void *p) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(nullptr);
  finish_all(lock);
  if (p) {
    munmap(p, pages(blocks[(char *)p]));
    used -= blocks[(char *)p];
    blocks.erase((char *)p);
  }
  return cudaSuccess;
}
API Error cudaHostAlloc(void **p, size_t size, unsigned) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(nullptr);
  *p = aligned_alloc(4096, pages(size));
  pinned[(char *)*p] = size;
  return cudaSuccess;
}
API Error cudaFreeHost(void *p) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(nullptr);
  finish_all(lock);
  pinned.erase((char *)p);
  free(p);
  return cudaSuccess;
}
API Error cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p) {
  ENTER;
  *attributes = {};
  attributes->type = within(blocks, p)   ? cudaMemoryTypeDevice
                     : within(pinned, p) ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
API Error cudaMemGetInfo(size_t *left, size_t *all) {
  ENTER;
  *left = total - used, *all = total;
  return cudaSuccess;
}
API Error cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  ENTER;
  ALIVE;
  CUstream_st *stream = at(handle);
  bool waits = !within(blocks, to) && !within(pinned, to);
  if (waits && stream->capture)
    FORBIDDEN_IN_CAPTURES(stream);
  Work work = [=] { return memcpy(to, from, size), true; };
  if (!within(blocks, from) && !within(pinned, from)) { // the caller may change it as soon as this returns
    std::string staged((const char *)from, size);
    work = [=] { return memcpy(to, staged.data(), size), true; };
  }
  Ref node = launch(stream, work);
  if (waits)
    finish(node, lock);
  return cudaSuccess;
}
API Error cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
  ENTER;
  ALIVE;
  launch(at(stream), [=] { return memset(p, value, size), true; });
  return cudaSuccess;
}

// --- devices: two alike

static int capability, multiprocessors, warps; // warps of a multiprocessor
static size_t shared_memory;                   // of a program
API void software_device(int arch, int count, int most, size_t shared) {
  capability = arch, multiprocessors = count, warps = most, shared_memory = shared;
}

API Error cudaGetDeviceCount(int *count) { return *count = 2, cudaSuccess; }
API Error cudaGetDevice(int *current) { return *current = device, cudaSuccess; }
API Error cudaSetDevice(int chosen) { return device = chosen, cudaSuccess; }
API Error cudaGetDeviceProperties(cudaDeviceProp *p, int number) {
  *p = {};
  strcpy(p->name, "Software GPU");
  p->major = capability / 10, p->minor = capability % 10, p->multiProcessorCount = multiprocessors;
  p->warpSize = 32, p->totalGlobalMem = total, p->pciBusID = number + 1;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 32 * warps, p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = shared_memory;
  p->sharedMemPerMultiprocessor = shared_memory + 1024;
  return cudaSuccess;
}
API Error cudaDeviceGetAttribute(int *value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrComputeCapabilityMajor          ? capability / 10
           : name == cudaDevAttrComputeCapabilityMinor        ? capability % 10
           : name == cudaDevAttrMultiProcessorCount           ? multiprocessors
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)shared_memory
                                                              : 0;
  return cudaSuccess;
}
API Error cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
API Error cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
API Error cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }
API Error cudaDeviceGetStreamPriorityRange(int *low, int *high) { return *low = 0, *high = -5, cudaSuccess; }
API Error cudaGetLastError() {
  Error error = last;
  return last = cudaSuccess, error;
}
API Error cudaPeekAtLastError() { return last; }
API const char *cudaGetErrorName(Error error) { return error ? "an error" : "no error"; }
API const char *cudaGetErrorString(Error error) {
  return error == cudaErrorMemoryAllocation           ? "out of memory"
         : error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
         : error == cudaErrorStreamCaptureInvalidated ? "operation failed due to a previous error during capture"
         : error == cudaErrorStreamCaptureUnjoined    ? "capturing stream has unjoined work"
         : error == cudaErrorStreamCaptureIsolation   ? "dependency created on uncaptured work in another stream"
         : error == cudaErrorLaunchFailure            ? "unspecified launch failure"
                                                      : "not supported by the GPU in software";
}
API Error cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *status) {
  *function = dlsym(RTLD_DEFAULT, name);
  *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API Error cudaDeviceSynchronize() {
  ENTER;
  if (!captures.empty())
    return fail(cudaErrorStreamCaptureUnsupported);
  finish_all(lock);
  ALIVE;
  return cudaSuccess;
}

// --- streams and events

API Error cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  ENTER;
  return *stream = new CUstream_st, cudaSuccess;
}
API Error cudaStreamGetPriority(cudaStream_t, int *priority) { return *priority = 0, cudaSuccess; }
API Error cudaStreamSynchronize(cudaStream_t handle) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(at(handle));
  finish(at(handle)->last, lock);
  ALIVE;
  return cudaSuccess;
}
API Error cudaStreamQuery(cudaStream_t handle) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(at(handle));
  return query(at(handle)->last, lock);
}
API Error cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  ENTER;
  *event = new CUevent_st;
  (*event)->timing = !(flags & cudaEventDisableTiming);
  return cudaSuccess;
}
API Error cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
API Error cudaEventDestroy(cudaEvent_t event) {
  ENTER;
  delete event;
  return cudaSuccess;
}
API Error cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
  ENTER;
  ALIVE;
  CUstream_st *stream = at(handle);
  event->captured = stream->capture && !(flags & cudaEventRecordExternal);
  if (event->captured)
    event->capture = stream->capture->id, event->tips = stream->tips, event->at = nullptr;
  else
    event->at = launch(stream, nullptr);
  return cudaSuccess;
}
API Error cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
API Error cudaEventQuery(cudaEvent_t event) {
  ENTER;
  if (event->captured)
    return fail(cudaErrorStreamCaptureUnsupported);
  FORBIDDEN_IN_CAPTURES(nullptr);
  return query(event->at, lock);
}
API Error cudaEventSynchronize(cudaEvent_t event) {
  ENTER;
  if (event->captured)
    return fail(cudaErrorStreamCaptureUnsupported);
  FORBIDDEN_IN_CAPTURES(nullptr);
  finish(event->at, lock);
  ALIVE;
  return cudaSuccess;
}
API Error cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  ENTER;
  if (!from->at || !to->at || !from->timing || !to->timing)
    return fail(cudaErrorInvalidResourceHandle);
  if (!from->at->done || !to->at->done)
    return cudaErrorNotReady;
  return *milliseconds = (to->at->at - from->at->at) * 1e3, cudaSuccess;
}
API Error cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  ENTER;
  ALIVE;
  CUstream_st *stream = at(handle);
  if (event->captured) {
    auto of = [=](Capture *c) { return c->id == event->capture; };
    auto found = std::find_if(captures.begin(), captures.end(), of);
    if (found == captures.end() || (stream->capture && stream->capture != *found))
      return fail(cudaErrorStreamCaptureIsolation);
    stream->capture = *found;
    stream->capture->streams.insert(stream);
    stream->tips.insert(stream->tips.end(), event->tips.begin(), event->tips.end());
  } else if (stream->capture && event->at) {
    stream->capture->broken = true;
    return fail(cudaErrorStreamCaptureIsolation);
  } else if (event->at && !event->at->done)
    launch(stream, nullptr, {event->at});
  return cudaSuccess;
}

// --- captures and graphs

API Error cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  ENTER;
  return *status = status_of(at(stream)), cudaSuccess;
}
API Error cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
  ENTER;
  CUstream_st *stream = at(handle);
  *status = status_of(stream);
  if (id && stream->capture)
    *id = stream->capture->id;
  if (graph && stream->capture)
    *graph = stream->capture->graph;
  return cudaSuccess;
}
API Error cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  return std::swap(*mode, own_mode), cudaSuccess;
}
API Error cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  ENTER;
  ALIVE;
  if (!stream || stream->capture)
    return fail(cudaErrorIllegalState);
  stream->capture = new Capture{new CUgraph_st, mode, std::this_thread::get_id(), ++ids, {stream}};
  captures.insert(stream->capture);
  return cudaSuccess;
}
API Error cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  ENTER;
  Capture *capture = stream->capture;
  *graph = nullptr;
  if (!capture)
    return fail(cudaErrorIllegalState);
  std::set<Ref> joined;
  std::vector<Ref> todo = stream->tips;
  while (!todo.empty()) {
    Ref node = todo.back();
    todo.pop_back();
    if (joined.insert(node).second)
      todo.insert(todo.end(), node->after.begin(), node->after.end());
  }
  for (CUstream_st *s : capture->streams)
    s->capture = nullptr, s->tips.clear();
  captures.erase(capture);
  if (capture->broken)
    return fail(cudaErrorStreamCaptureInvalidated);
  if (joined.size() != capture->graph->nodes.size())
    return fail(cudaErrorStreamCaptureUnjoined);
  return *graph = capture->graph, cudaSuccess;
}
API Error cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
  return *count = graph->nodes.size(), cudaSuccess;
}
API Error cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
  return *executable = new CUgraphExec_st{graph->nodes}, cudaSuccess;
}
API Error cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  ENTER;
  ALIVE;
  CUstream_st *stream = at(handle);
  if (stream->capture)
    return fail(cudaErrorNotSupported);
  std::map<Ref, Ref> copies;
  std::vector<Ref> all;
  for (const Ref &node : executable->nodes) {
    Ref copy = std::make_shared<Node>();
    copy->work = node->work;
    for (const Ref &before : node->after)
      copy->after.push_back(copies.at(before));
    if (node->after.empty() && stream->last && !stream->last->done)
      copy->after.push_back(stream->last);
    all.push_back(copies[node] = copy);
    pending.push_back(copy);
  }
  launch(stream, nullptr, all);
  return cudaSuccess;
}
API Error cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
API Error cudaGraphExecDestroy(cudaGraphExec_t executable) {
  ENTER;
  FORBIDDEN_IN_CAPTURES(nullptr);
  return delete executable, cudaSuccess;
}

// --- PyTorch's own kernels: none is needed but the one that takes its time

static std::map<const void *, std::string> &names() {
  static std::map<const void *, std::string> found;
  return found;
}
API void **__cudaRegisterFatBinary(void *binary) { return (void **)binary; }
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API char __cudaInitModule(void **) { return 0; }
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API void __cudaRegisterFunction(
    void **, const char *function, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  names()[function] = name;
}
static thread_local void *launched_on;
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void *stream) { return launched_on = stream, 0; }
API Error __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void **stream) {
  return *stream = launched_on, cudaSuccess;
}
API Error __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, cudaSuccess; }
API Error cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t stream) {
  ENTER;
  ALIVE;
  if (names()[function].find("spin_kernel") == std::string::npos) {
    fprintf(stderr, "PyTorch launches a kernel of its own: %s\n", names()[function].c_str());
    return fail(cudaErrorNotSupported);
  }
  launch(at(stream), nullptr);
  return cudaSuccess;
}
API Error __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **p, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, p, shared, stream);
}
