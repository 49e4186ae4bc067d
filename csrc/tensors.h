// Where the numbers of tensors are, without torch's headers and without a call into Python for each of their
// attributes: torch (2.10 and later) lets C code read a tensor through DLPack's exchange API.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace rnnfast {

// The parts of DLPack's stable ABI (major version 1) that are read here.
struct DlTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const int64_t* shape;
    const int64_t* strides;  // in numbers
    uint64_t byte_offset;
};

struct DlManagedTensor;

// Functions return 0, or -1 with a Python exception set.
struct DlExchange {
    struct {
        uint32_t major, minor;
    } version;
    void* previous_version;
    // A new tensor of the dtype, shape and device of `like`; an error is told by `fail(context, kind, message)`.
    int (*allocate)(const DlTensor* like, DlManagedTensor** out, void* context,
                    void (*fail)(void* context, const char* kind, const char* message));
    int (*borrow)(void* tensor, DlManagedTensor** out);
    int (*give)(DlManagedTensor* tensor, void** out);  // as a Python object, which owns it
    int (*read)(void* tensor, DlTensor* out);
};

// What `tensor_type` (torch.Tensor) offers; nullptr: nothing.
inline const DlExchange* find_exchange(pybind11::handle tensor_type) {
    const pybind11::object capsule = pybind11::getattr(tensor_type, "__dlpack_c_exchange_api__", pybind11::none());
    if (capsule.is_none()) return nullptr;
    void* const pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!pointer) throw pybind11::error_already_set();
    const auto* exchange = static_cast<const DlExchange*>(pointer);
    return exchange->version.major == 1 && exchange->read ? exchange : nullptr;
}

// Are the numbers to be read with the other sign? DLPack does not tell.
inline bool is_negated(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* const answer = PyObject_CallMethodNoArgs(tensor, name);
    if (!answer) throw pybind11::error_already_set();
    Py_DECREF(answer);  // True or False, which stay
    return answer != Py_False;
}

// Reads a tensor of floating-point numbers of `bytes` bytes on the CPU; false: it is none.
inline bool read_numbers(const DlExchange& exchange, PyObject* tensor, int bytes, DlTensor& t) {
    constexpr int cpu = 1, floating_point = 2;  // DLPack's codes
    if (is_negated(tensor)) return false;
    if (exchange.read(tensor, &t) != 0) {
        PyErr_Clear();  // whoever has no numbers in memory gets his error where each tensor is looked at
        return false;
    }
    return t.device.type == cpu && t.dtype.code == floating_point && t.dtype.bits == 8 * bytes && t.dtype.lanes == 1;
}

// Do the numbers follow each other? Strides are in numbers.
inline bool is_dense(int dims, const int64_t* shape, const int64_t* strides) {
    int64_t size = 1;
    for (int d = dims - 1; d >= 0; --d) {
        if (shape[d] != 1 && strides[d] != size) return false;
        size *= shape[d];
    }
    return true;
}

// Where its numbers are; 0: there are none, or they are not aligned.
inline uintptr_t address_of(const DlTensor& t, int bytes) {
    for (int d = 0; d < t.ndim; ++d)
        if (!t.shape[d]) return 0;
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    return address % bytes == 0 ? address : 0;
}

// How the kernels read some tensors: floating-point numbers on the CPU, dense, of these shapes.
class Layout {
public:
    using Shape = std::vector<int64_t>;
    using Addresses = std::vector<uintptr_t>;

    Layout(pybind11::object tensor_type, std::vector<Shape> shapes, int bytes)
        : tensor_type_(std::move(tensor_type)),
          exchange_(find_exchange(tensor_type_)),
          shapes_(std::move(shapes)),
          bytes_(bytes) {}

    // The addresses of tensors, 0 for None; nothing if one of them is not laid out so, or cannot be told from here.
    std::optional<Addresses> addresses(const pybind11::sequence& tensors) const {
        if (!exchange_ || tensors.size() != shapes_.size()) return std::nullopt;
        Addresses found(shapes_.size(), 0);
        for (size_t i = 0; i < found.size(); ++i) {
            const pybind11::object tensor = tensors[i];
            if (!tensor.is_none() && !(found[i] = address(tensor.ptr(), shapes_[i]))) return std::nullopt;
        }
        return found;
    }

private:
    // 0: not laid out so. Tensors without numbers have no address, either.
    uintptr_t address(PyObject* tensor, const Shape& shape) const {
        if (!PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()))) return 0;
        DlTensor t;
        const bool fits = read_numbers(*exchange_, tensor, bytes_, t) && t.ndim == int32_t(shape.size()) &&
                          std::equal(shape.begin(), shape.end(), t.shape) && is_dense(t.ndim, t.shape, t.strides);
        return fits ? address_of(t, bytes_) : 0;
    }

    const pybind11::object tensor_type_;
    const DlExchange* const exchange_;
    const std::vector<Shape> shapes_;
    const int bytes_;
};

}  // namespace rnnfast
