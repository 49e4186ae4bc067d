// csrc/stream.h: pointers are checked, exceptions become a status and a message.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>

#include "../../stream.h"
#include "file.h"

struct rnnfast_stream {
    std::unique_ptr<rnnfast::AnyStream> stream;
};

namespace rnnfast {
namespace {

void report(rnnfast_error* error, rnnfast_status status, const char* message) {
    if (!error) return;
    error->status = status;
    std::snprintf(error->message, sizeof(error->message), "%s", message);
}

rnnfast_status status_of(FileError::Kind kind) {
    switch (kind) {
        case FileError::Kind::version:
            return RNNFAST_VERSION;
        case FileError::Kind::checksum:
            return RNNFAST_CHECKSUM;
        case FileError::Kind::format:
            break;
    }
    return RNNFAST_FORMAT;
}

struct CannotRead : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string read_all(const char* path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) throw CannotRead(std::string(path) + ": " + std::strerror(errno));
    std::string bytes;
    char part[1 << 16];
    for (size_t got; (got = std::fread(part, 1, sizeof(part), file.get())) > 0;) bytes.append(part, got);
    if (std::ferror(file.get())) throw CannotRead(std::string(path) + ": " + std::strerror(errno));
    return bytes;
}

// What make() gives, or nullptr and the reason.
template <class Make>
rnnfast_stream* open_by(Make make, rnnfast_error* error) {
    try {
        rnnfast_stream* const opened = new rnnfast_stream{make()};
        report(error, RNNFAST_OK, "");
        return opened;
    } catch (const FileError& e) {
        report(error, status_of(e.kind), e.what());
    } catch (const CannotRead& e) {
        report(error, RNNFAST_FILE, e.what());
    } catch (const std::invalid_argument& e) {
        report(error, RNNFAST_ARGUMENT, e.what());
    } catch (const std::exception&) {  // std::bad_alloc, and what containers throw for sizes that nobody has
        report(error, RNNFAST_MEMORY, "not enough memory");
    }
    return nullptr;
}

template <class T, class S>
rnnfast_status fault_of(S* stream, bool has_arrays) {
    if (!stream || !has_arrays) return RNNFAST_ARGUMENT;
    return stream->stream->number_bytes() == sizeof(T) ? RNNFAST_OK : RNNFAST_TYPE;
}

template <class T>
rnnfast_status run(rnnfast_stream* stream, int64_t count, const T* x, T* y) {
    const rnnfast_status fault = fault_of<T>(stream, x && y && count >= 0);
    if (fault == RNNFAST_OK) stream->stream->run(count, x, y);
    return fault;
}

template <class T>
rnnfast_status get_state(const rnnfast_stream* stream, T* h, T* c) {
    const rnnfast_status fault = fault_of<T>(stream, h && (c || !stream || !stream->stream->shape.cell->has_c()));
    if (fault == RNNFAST_OK) stream->stream->get_state(h, c);
    return fault;
}

template <class T>
rnnfast_status set_state(rnnfast_stream* stream, const T* h, const T* c) {
    const rnnfast_status fault = fault_of<T>(stream, h && (c || !stream || !stream->stream->shape.cell->has_c()));
    if (fault == RNNFAST_OK) stream->stream->set_state(h, c);
    return fault;
}

}  // namespace
}  // namespace rnnfast

extern "C" {

rnnfast_stream* rnnfast_open(const char* path, int64_t batch_size, rnnfast_error* error) {
    return rnnfast::open_by(
        [&] {
            if (!path) throw std::invalid_argument("path: expected a string, got NULL");
            const std::string bytes = rnnfast::read_all(path);
            return rnnfast::read_stream(bytes.data(), bytes.size(), batch_size);
        },
        error);
}

rnnfast_stream* rnnfast_open_bytes(const void* bytes, size_t size, int64_t batch_size, rnnfast_error* error) {
    return rnnfast::open_by(
        [&] {
            if (!bytes) throw std::invalid_argument("bytes: expected an address, got NULL");
            return rnnfast::read_stream(bytes, size, batch_size);
        },
        error);
}

void rnnfast_close(rnnfast_stream* stream) { delete stream; }

rnnfast_status rnnfast_get_sizes(const rnnfast_stream* stream, rnnfast_sizes* sizes) {
    if (!stream || !sizes) return RNNFAST_ARGUMENT;
    const rnnfast::AnyStream& it = *stream->stream;
    const rnnfast::StreamShape& s = it.shape;
    *sizes = {it.B, s.I, s.H, s.L, s.recurrent(), s.output(), it.number_bytes(), s.cell->has_c()};
    return RNNFAST_OK;
}

rnnfast_status rnnfast_step(rnnfast_stream* stream, const float* x, float* y) { return rnnfast::run(stream, 1, x, y); }
rnnfast_status rnnfast_step_double(rnnfast_stream* stream, const double* x, double* y) {
    return rnnfast::run(stream, 1, x, y);
}
rnnfast_status rnnfast_steps(rnnfast_stream* stream, int64_t count, const float* x, float* y) {
    return rnnfast::run(stream, count, x, y);
}
rnnfast_status rnnfast_steps_double(rnnfast_stream* stream, int64_t count, const double* x, double* y) {
    return rnnfast::run(stream, count, x, y);
}

rnnfast_status rnnfast_reset(rnnfast_stream* stream, const unsigned char* mask) {
    if (!stream) return RNNFAST_ARGUMENT;
    stream->stream->reset(mask);
    return RNNFAST_OK;
}
rnnfast_status rnnfast_state(const rnnfast_stream* stream, float* h, float* c) {
    return rnnfast::get_state(stream, h, c);
}
rnnfast_status rnnfast_state_double(const rnnfast_stream* stream, double* h, double* c) {
    return rnnfast::get_state(stream, h, c);
}
rnnfast_status rnnfast_set_state(rnnfast_stream* stream, const float* h, const float* c) {
    return rnnfast::set_state(stream, h, c);
}
rnnfast_status rnnfast_set_state_double(rnnfast_stream* stream, const double* h, const double* c) {
    return rnnfast::set_state(stream, h, c);
}

const char* rnnfast_status_text(rnnfast_status status) {
    switch (status) {
        case RNNFAST_OK:
            return "all is well";
        case RNNFAST_ARGUMENT:
            return "a null pointer, or a number out of range";
        case RNNFAST_FILE:
            return "the file cannot be read";
        case RNNFAST_FORMAT:
            return "the file is no model";
        case RNNFAST_VERSION:
            return "the file is of another version of the format";
        case RNNFAST_CHECKSUM:
            return "the file is cut off, or some of its bits have changed";
        case RNNFAST_TYPE:
            return "the model has the other type of numbers";
        case RNNFAST_MEMORY:
            return "there is not enough memory";
    }
    return "no status of rnnfast";
}

}  // extern "C"
