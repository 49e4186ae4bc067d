// rnnfast.Stream's base class. A call of what fits, a NumPy array or a tensor, stays within C++: for a single
// step Python around the kernel would cost more than the kernel. Everything else goes to `_call_by_hand` of the
// subclass.
#include "stream_binding.h"

#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cpu/stream/file.h"
#include "tensors.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

using Address = uintptr_t;  // 0: absent

// Multiply-adds of a step that another thread is worth: the region and its barriers take some microseconds.
constexpr double work_of_a_thread = 2.5e5;
// From so many multiply-adds of a call on others may run Python meanwhile.
constexpr double work_without_gil = 2e6;

// Numbers of an argument or a result.
struct Numbers {
    Address address = 0;  // 0: they do not fit
    int dims = 0;
    int64_t shape[3] = {1, 1, 1}, strides[3] = {0, 0, 0};  // the last `dims` of them

    const int64_t* sizes() const { return shape + 3 - dims; }
    bool is_dense() const { return rnnfast::is_dense(3, shape, strides); }
    int64_t size() const { return shape[0] * shape[1] * shape[2]; }
};

class PyStream {
public:
    PyStream(std::unique_ptr<AnyStream> stream, py::object array_type, py::object tensor_type)
        : stream_(std::move(stream)),
          array_type_(std::move(array_type)),
          tensor_type_(std::move(tensor_type)),
          exchange_(find_exchange(tensor_type_)),
          dtype_(stream_->number_bytes() == 4 ? py::dtype::of<float>() : py::dtype::of<double>()),
          work_(stream_->shape.work() * double(stream_->B)) {}

    AnyStream& core() const { return *stream_; }
    const StreamShape& shape() const { return stream_->shape; }
    int64_t batch() const { return stream_->B; }
    int bytes() const { return stream_->number_bytes(); }

    // A new reference to the result, nullptr: this call does not fit.
    PyObject* answer(PyObject* x, PyObject* out) {
        const bool is_array = Py_TYPE(x) == type(array_type_);
        if (!is_array && !(exchange_ && PyObject_TypeCheck(x, type(tensor_type_)))) return nullptr;
        const Numbers in = is_array ? read_array(x, false) : read_tensor(x);
        const int64_t steps = steps_of(in);
        if (!steps) return nullptr;
        ssize_t shape[3];
        std::copy(in.sizes(), in.sizes() + in.dims, shape);
        shape[in.dims - 1] = this->shape().output();
        py::object result;
        Address y;
        if (!out) {
            result = is_array ? make_array(in.dims, shape, y) : make_tensor(in.dims, shape, y);
        } else {
            const bool same_kind =
                is_array ? Py_TYPE(out) == type(array_type_) : PyObject_TypeCheck(out, type(tensor_type_));
            if (!same_kind) return nullptr;
            const Numbers given = is_array ? read_array(out, true) : read_tensor(out);
            if (!given.address || given.dims != in.dims || !std::equal(shape, shape + in.dims, given.sizes()) ||
                !given.is_dense() || (in.is_dense() && overlap(in, given)))
                return nullptr;
            y = given.address;
            result = py::reinterpret_borrow<py::object>(out);
        }
        const Use use(*this);
        run_alone(steps, in.is_dense() ? in.address : gather(in), y);
        return result.release().ptr();
    }

    void run(int64_t steps, Address x, Address y) {
        const Use use(*this);
        run_alone(steps, x, y);
    }

    // Guards the state, the weights and what was gathered while another thread runs Python.
    class Use {
    public:
        explicit Use(PyStream& stream) : stream_(stream) {
            if (stream.in_use_) throw std::runtime_error("this stream is being used by another thread");
            stream.in_use_ = true;
        }
        ~Use() { stream_.in_use_ = false; }

    private:
        PyStream& stream_;
    };

private:
    static PyTypeObject* type(const py::object& of) { return reinterpret_cast<PyTypeObject*>(of.ptr()); }

    void run_alone(int64_t steps, Address x, Address y) {
        const void* const from = reinterpret_cast<const void*>(x);
        void* const to = reinterpret_cast<void*>(y);
        std::optional<py::gil_scoped_release> release;
        if (work_ * double(steps) >= work_without_gil) release.emplace();
        const int threads =
            work_ < 2 * work_of_a_thread ? 1 : int(std::min<double>(omp_get_max_threads(), work_ / work_of_a_thread));
        if (threads > 1) {
            Barrier barrier;
            barrier.expect(threads);
            if (run_parallel(threads, [&](int part) { stream_->run_part(steps, from, to, part, threads, barrier); }))
                return stream_->finish_parts(steps);
        }
        stream_->run(steps, from, to);
    }

    Numbers read_array(PyObject* object, bool writes) const {
        const auto array = py::reinterpret_borrow<py::array>(object);
        const bool fits = array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_ && array.dtype().is(dtype_) &&
                          array.ndim() <= 3 && (!writes || array.writeable());
        if (!fits) return {};
        Numbers found{reinterpret_cast<Address>(array.data()), int(array.ndim())};
        for (int d = 0, to = 3 - found.dims; d < found.dims; ++d, ++to) {
            found.shape[to] = array.shape(d), found.strides[to] = array.strides(d) / bytes();
            if (!found.shape[to] || array.strides(d) % bytes()) return {};
        }
        return found;
    }
    Numbers read_tensor(PyObject* tensor) const {
        DlTensor t;
        if (!read_numbers(*exchange_, tensor, bytes(), t) || t.ndim > 3) return {};
        Numbers found{address_of(t, bytes()), t.ndim};
        std::copy(t.shape, t.shape + t.ndim, found.shape + 3 - t.ndim);
        std::copy(t.strides, t.strides + t.ndim, found.strides + 3 - t.ndim);
        return found;
    }

    // Copies numbers that do not follow each other; -> where they do.
    Address gather(const Numbers& x) {
        gathered_.resize(size_t(x.size() * bytes()));
        char* to = gathered_.data();
        const auto* const from = reinterpret_cast<const char*>(x.address);
        for (int64_t t = 0; t < x.shape[0]; ++t)
            for (int64_t b = 0; b < x.shape[1]; ++b)
                for (int64_t i = 0; i < x.shape[2]; ++i, to += bytes()) {
                    const int64_t at = t * x.strides[0] + b * x.strides[1] + i * x.strides[2];
                    std::memcpy(to, from + at * bytes(), size_t(bytes()));
                }
        return reinterpret_cast<Address>(gathered_.data());
    }

    // Of x (I), (B,I) or (T,B,I); 0: it is none of these.
    int64_t steps_of(const Numbers& x) const {
        if (!x.address || x.dims < 1 || x.shape[2] != shape().I || x.shape[1] != (x.dims == 1 ? 1 : batch())) return 0;
        return x.dims == 1 && batch() != 1 ? 0 : x.shape[0];
    }

    // The result, and where its numbers are.
    py::object make_array(int dims, const ssize_t* shape, Address& numbers) const {
        py::array made(dtype_, std::vector<ssize_t>(shape, shape + dims));
        numbers = reinterpret_cast<Address>(made.data());
        return std::move(made);
    }
    py::object make_tensor(int dims, const ssize_t* shape, Address& numbers) const {
        DlTensor like{};
        like.device.type = 1;
        like.ndim = dims;
        like.dtype.code = 2, like.dtype.bits = uint8_t(8 * bytes()), like.dtype.lanes = 1;
        like.shape = reinterpret_cast<const int64_t*>(shape);
        DlManagedTensor* made = nullptr;
        void* tensor = nullptr;
        const auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
        if (exchange_->allocate(&like, &made, nullptr, fail) != 0 || exchange_->give(made, &tensor) != 0 ||
            exchange_->read(tensor, &like) != 0)
            throw py::error_already_set();
        numbers = reinterpret_cast<Address>(like.data) + like.byte_offset;
        return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
    }

    // Would a result be written over inputs that are still to be read?
    bool overlap(const Numbers& x, const Numbers& y) const {
        if (x.address == y.address && shape().output() == shape().I) return false;
        return x.address < y.address + Address(y.size() * bytes()) &&
               y.address < x.address + Address(x.size() * bytes());
    }

    const std::unique_ptr<AnyStream> stream_;
    const py::object array_type_, tensor_type_;
    const DlExchange* const exchange_;  // nullptr: torch is too old to be asked
    const py::dtype dtype_;
    const double work_;
    std::vector<char> gathered_;
    bool in_use_ = false;
};

// stream(x, *, out=None)
PyObject* call(PyObject* self, PyObject* args, PyObject* keywords) {
    static PyObject* const by_hand = PyUnicode_InternFromString("_call_by_hand");
    static PyObject* const out_name = PyUnicode_InternFromString("out");
    try {
        PyObject* out = nullptr;
        if (keywords && PyDict_Size(keywords) > 0) {
            out = PyDict_GetItemWithError(keywords, out_name);
            if (PyErr_Occurred()) return nullptr;
            if (PyDict_Size(keywords) != (out ? 1 : 0))
                return PyErr_SetString(PyExc_TypeError, "a stream takes x and out= alone"), nullptr;
        }
        if (PyTuple_GET_SIZE(args) != 1)
            return PyErr_Format(PyExc_TypeError, "a stream takes one argument, x, and out=; got %zd arguments",
                                PyTuple_GET_SIZE(args));
        PyObject* const x = PyTuple_GET_ITEM(args, 0);
        if (out == Py_None) out = nullptr;
        if (PyObject* const answer = py::cast<PyStream&>(py::handle(self)).answer(x, out)) return answer;
        return PyObject_CallMethodObjArgs(self, by_hand, x, out ? out : Py_None, nullptr);
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

std::unique_ptr<PyStream> make(const std::string& cell, int64_t I, int64_t H, int64_t P, int64_t L, bool bias,
                               int64_t O, bool readout_bias, int bytes, int64_t B, py::object array_type,
                               py::object tensor_type) {
    const StreamShape shape{&find_cell(cell), I, H, P, L, bias, O, readout_bias};
    return std::make_unique<PyStream>(make_stream(shape, bytes, B), std::move(array_type), std::move(tensor_type));
}

std::unique_ptr<PyStream> read(const py::bytes& file, int64_t B, py::object array_type, py::object tensor_type) {
    const std::string_view bytes(file);
    try {
        return std::make_unique<PyStream>(read_stream(bytes.data(), bytes.size(), B), std::move(array_type),
                                          std::move(tensor_type));
    } catch (const FileError& error) {
        throw py::value_error(error.what());
    }
}

void set_parameters(PyStream& stream, const std::vector<Address>& addresses) {
    if (addresses.size() != stream.core().parameter_sizes().size())
        throw std::invalid_argument("wrong number of arrays");
    std::vector<const void*> arrays;
    for (const Address address : addresses) arrays.push_back(reinterpret_cast<const void*>(address));
    const PyStream::Use use(stream);
    stream.core().set_parameters(arrays);
}

}  // namespace

void define_stream(py::module_& m) {
    const auto size = [](auto member) { return [member](const PyStream& stream) { return stream.shape().*member; }; };
    py::class_<PyStream>(m, "Stream",
                         py::custom_type_setup([](PyHeapTypeObject* type) { type->ht_type.tp_call = call; }))
        .def(py::init(&make), py::arg("cell"), py::arg("I"), py::arg("H"), py::arg("P"), py::arg("L"), py::arg("bias"),
             py::arg("O"), py::arg("readout_bias"), py::arg("bytes"), py::arg("B"), py::arg("array_type"),
             py::arg("tensor_type"))
        .def(py::init(&read), py::arg("file"), py::arg("B"), py::arg("array_type"), py::arg("tensor_type"))
        .def("_run", &PyStream::run, py::arg("steps"), py::arg("x"), py::arg("y"))
        .def("_set_parameters", &set_parameters, py::arg("arrays"))
        .def(
            "_reset",
            [](PyStream& stream, Address mask) {
                const PyStream::Use use(stream);
                stream.core().reset(reinterpret_cast<const uint8_t*>(mask));
            },
            py::arg("mask"))
        .def(
            "_get_state",
            [](PyStream& stream, Address h, Address c) {
                const PyStream::Use use(stream);
                stream.core().get_state(reinterpret_cast<void*>(h), reinterpret_cast<void*>(c));
            },
            py::arg("h"), py::arg("c"))
        .def(
            "_set_state",
            [](PyStream& stream, Address h, Address c) {
                const PyStream::Use use(stream);
                stream.core().set_state(reinterpret_cast<const void*>(h), reinterpret_cast<const void*>(c));
            },
            py::arg("h"), py::arg("c"))
        .def("_to_bytes",
             [](PyStream& stream) {
                 const PyStream::Use use(stream);
                 return py::bytes(write_stream(stream.core()));
             })
        .def_property_readonly("batch_size", &PyStream::batch)
        .def_property_readonly("input_size", size(&StreamShape::I))
        .def_property_readonly("hidden_size", size(&StreamShape::H))
        .def_property_readonly("proj_size", size(&StreamShape::P))
        .def_property_readonly("num_layers", size(&StreamShape::L))
        .def_property_readonly("output_size", [](const PyStream& stream) { return stream.shape().output(); })
        .def_property_readonly("_bytes", &PyStream::bytes)
        .def_property_readonly("_cell", [](const PyStream& stream) { return *stream.shape().cell; });
}

}  // namespace rnnfast
