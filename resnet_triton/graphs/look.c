/* What is looked at in each call of a captured model. look.py says what that is, and does the same in Python. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <ATen/dlpack.h>

static const DLPackExchangeAPI *api; /* by which PyTorch describes a tensor; set when this module is imported */

typedef struct {
  char *bytes;
  size_t used, room;
} Notes;

/* Like all that follows, -1 on failure. */
static int note(Notes *notes, const void *what, size_t size) {
  if (notes->used + size > notes->room) {
    size_t room = 2 * (notes->room + size);
    char *bytes = PyMem_Realloc(notes->bytes, room);
    if (!bytes) return -1;
    notes->bytes = bytes;
    notes->room = room;
  }
  memcpy(notes->bytes + notes->used, what, size);
  notes->used += size;
  return 0;
}

static int note_address(Notes *notes, const DLTensor *t) {
  const char *address = (const char *)t->data + t->byte_offset;
  return note(notes, &address, sizeof address);
}

static int note_layout(Notes *notes, const DLTensor *t) {
  size_t size = t->ndim * sizeof(int64_t);
  if (note(notes, &t->dtype, sizeof t->dtype)) return -1;
  if (note(notes, t->shape, size)) return -1;
  if (note(notes, t->strides, size)) return -1;
  return 0;
}

static int note_tensors(Notes *notes, PyObject *tensors) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
    DLTensor t;
    if (api->dltensor_from_py_object_no_sync(PyTuple_GET_ITEM(tensors, i), &t)) return -1;
    if (note_address(notes, &t) || note_layout(notes, &t)) return -1;
  }
  return 0;
}

static int note_addresses(Notes *notes, PyObject *values, PyObject *places) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); i++) {
    Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GET_ITEM(places, i));
    DLTensor t;
    if (place < 0 || place >= PySequence_Fast_GET_SIZE(values)) return -1;
    if (api->dltensor_from_py_object_no_sync(PySequence_Fast_GET_ITEM(values, place), &t)) return -1;
    if (note_address(notes, &t)) return -1;
  }
  return 0;
}

static int note_modules(Notes *notes, PyObject *modules) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(modules); i++) {
    PyObject *module = PyList_GET_ITEM(modules, i);
    PyTypeObject *cls = Py_TYPE(module);
    PyObject *own = PyObject_GenericGetDict(module, NULL);
    if (!own) return -1;
    Py_DECREF(own); /* the module keeps it */
    if (note(notes, &cls, sizeof cls)) return -1;
    if (note(notes, &own, sizeof own)) return -1;
  }
  return 0;
}

static int are_empty(PyObject *dicts) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts); i++)
    if (PyDict_Size(PyList_GET_ITEM(dicts, i))) return 0;
  return 1;
}

/* The notes as bytes, or None where something failed. */
static PyObject *taken(Notes *notes, int failed) {
  PyObject *bytes = failed ? NULL : PyBytes_FromStringAndSize(notes->bytes, (Py_ssize_t)notes->used);
  PyMem_Free(notes->bytes);
  if (bytes) return bytes;
  PyErr_Clear();
  Py_RETURN_NONE;
}

static PyObject *look(PyObject *self, PyObject *args) {
  PyObject *dicts, *modules, *tensors;
  if (!PyArg_ParseTuple(args, "O!O!O!", &PyList_Type, &dicts, &PyList_Type, &modules, &PyTuple_Type, &tensors))
    return NULL;
  Notes notes = {0};
  int failed = !are_empty(dicts) || note_modules(&notes, modules) || note_tensors(&notes, tensors);
  return taken(&notes, failed);
}

static PyObject *addresses(PyObject *self, PyObject *args) {
  PyObject *given, *places;
  if (!PyArg_ParseTuple(args, "OO!", &given, &PyTuple_Type, &places)) return NULL;
  PyObject *values = PySequence_Fast(given, "expected a list or a tuple");
  if (!values) return NULL;
  Notes notes = {0};
  int failed = note_addresses(&notes, values, places);
  Py_DECREF(values);
  return taken(&notes, failed);
}

static PyMethodDef functions[] = {
    {"look", look, METH_VARARGS, NULL},
    {"addresses", addresses, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "resnet_triton_look", NULL, -1, functions};

PyMODINIT_FUNC PyInit_resnet_triton_look(void) {
  PyObject *torch = PyImport_ImportModule("torch");
  PyObject *cls = torch ? PyObject_GetAttrString(torch, "Tensor") : NULL;
  PyObject *capsule = cls ? PyObject_GetAttrString(cls, "__dlpack_c_exchange_api__") : NULL;
  api = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
  Py_XDECREF(capsule);
  Py_XDECREF(cls);
  Py_XDECREF(torch);
  if (!api) return NULL;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
    return PyErr_Format(PyExc_ImportError, "PyTorch's DLPack describes no tensors to C");
  return PyModule_Create(&module);
}
