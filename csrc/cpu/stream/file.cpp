#include "file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <new>

namespace rnnfast {
namespace {

constexpr char magic[8] = "RNNFAST";
constexpr uint32_t version = 1;
constexpr size_t header_bytes = 80, checksum_bytes = 4;
constexpr int64_t largest_size = INT32_MAX;
constexpr bool is_little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

template <class Number>
void append(std::string& bytes, Number number) {
    for (size_t i = 0; i < sizeof(Number); ++i) bytes += char(uint64_t(number) >> 8 * i & 0xff);
}

template <class Number>
Number number_at(const uint8_t* bytes) {
    uint64_t number = 0;
    for (size_t i = 0; i < sizeof(Number); ++i) number |= uint64_t(bytes[i]) << 8 * i;
    return static_cast<Number>(number);
}

// Numbers of the machine become those of a file, and back.
void swap_bytes(uint8_t* numbers, size_t size, int number_bytes) {
    if (is_little_endian) return;
    for (size_t i = 0; i < size; i += size_t(number_bytes)) std::reverse(numbers + i, numbers + i + number_bytes);
}

uint32_t crc32(const uint8_t* bytes, size_t size) {
    static const auto table = [] {
        std::array<uint32_t, 256> remainders;
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t rest = byte;
            for (int bit = 0; bit < 8; ++bit) rest = rest & 1 ? rest >> 1 ^ 0xedb88320u : rest >> 1;
            remainders[byte] = rest;
        }
        return remainders;
    }();
    uint32_t crc = ~0u;
    for (size_t i = 0; i < size; ++i) crc = table[(crc ^ bytes[i]) & 0xff] ^ crc >> 8;
    return ~crc;
}

[[noreturn]] void fail(const std::string& what) { throw FileError(FileError::Kind::format, what); }

// Of all parameters: cannot overflow, whatever sizes a file has.
unsigned __int128 count_parameters(const StreamShape& s) {
    using Count = unsigned __int128;
    const Count G = Count(s.cell->input_gates.count), H = Count(s.H), R = Count(s.recurrent()), L = Count(s.L),
                O = Count(s.O);
    const Count inputs = Count(s.I) + (L - 1) * R;  // of all layers
    return G * H * (inputs + L * R + (s.bias ? 2 * L : 0)) + L * Count(s.cell->unit_parameters) * H +
           L * Count(s.P) * H + O * (R + (s.readout_bias ? 1 : 0));
}

// Names the first thing that is wrong; "": nothing.
std::string fault_of(const StreamShape& s) {
    const auto out_of = [](const char* name, int64_t size, int64_t least) -> std::string {
        if (size >= least && size <= largest_size) return "";
        return std::string(name) + ": expected " + std::to_string(least) + " to " + std::to_string(largest_size) +
               ", got " + std::to_string(size);
    };
    for (const std::string& fault :
         {out_of("input size", s.I, 1), out_of("hidden size", s.H, 1), out_of("projection size", s.P, 0),
          out_of("number of layers", s.L, 1), out_of("outputs of the readout", s.O, 0)})
        if (!fault.empty()) return fault;
    if (s.P && !s.cell->projects) return "projection size: expected 0 for cell '" + std::string(s.cell->name) + "'";
    if (s.readout_bias && !s.O) return "a bias of a readout: expected a readout, too";
    return "";
}

StreamShape read_shape(const uint8_t* bytes) {
    const char* const name = reinterpret_cast<const char*>(bytes) + 16;
    const Cell* cell = nullptr;
    for (const Cell& one : cells())
        if (std::strncmp(one.name, name, 16) == 0) cell = &one;
    if (!cell) fail("unknown cell '" + std::string(name, strnlen(name, 16)) + "'");
    const auto size = [&](int i) { return number_at<int64_t>(bytes + 32 + 8 * i); };
    const uint32_t flags = number_at<uint32_t>(bytes + 72);
    if (flags > 3 || number_at<uint32_t>(bytes + 76)) fail("flags: expected 0 to 3, got " + std::to_string(flags));
    const StreamShape shape{cell, size(0), size(1), size(2), size(3), (flags & 1) != 0, size(4), (flags & 2) != 0};
    const std::string fault = fault_of(shape);
    if (!fault.empty()) fail(fault);
    return shape;
}

}  // namespace

std::unique_ptr<AnyStream> make_stream(const StreamShape& shape, int number_bytes, int64_t B) {
    const std::string fault = fault_of(shape);
    if (!fault.empty()) throw std::invalid_argument(fault);
    if (B < 1 || B > largest_size)
        throw std::invalid_argument("batch size: expected 1 to " + std::to_string(largest_size) + ", got " +
                                    std::to_string(B));
    // What no machine has; sums of sizes below cannot overflow.
    const double padded = double(shape.H) + double(shape.P) + double(shape.O) + 64;
    if (double(B + 64) * double(shape.L) * padded * 64 > 1e13) throw std::bad_alloc();
    if (number_bytes == 4) return std::make_unique<Stream<float>>(shape, B);
    if (number_bytes == 8) return std::make_unique<Stream<double>>(shape, B);
    throw std::invalid_argument("bytes of a number: expected 4 or 8, got " + std::to_string(number_bytes));
}

std::string write_stream(const AnyStream& stream) {
    const StreamShape& s = stream.shape;
    const int number_bytes = stream.number_bytes();
    std::string bytes(magic, sizeof(magic));
    append(bytes, version);
    append(bytes, uint32_t(number_bytes));
    char name[16] = {};
    std::strncpy(name, s.cell->name, sizeof(name) - 1);
    bytes.append(name, sizeof(name));
    for (const int64_t size : {s.I, s.H, s.P, s.L, s.O}) append(bytes, size);
    append(bytes, uint32_t(s.bias) + 2 * uint32_t(s.readout_bias));
    append(bytes, uint32_t(0));

    const std::vector<int64_t> sizes = stream.parameter_sizes();
    size_t total = bytes.size();
    for (const int64_t size : sizes) total += size_t(size) * size_t(number_bytes);
    bytes.resize(total);
    std::vector<void*> arrays;
    Memory aligned(total);
    uint8_t* to = static_cast<uint8_t*>(aligned.data());
    for (const int64_t size : sizes) {
        arrays.push_back(to);
        to += size * number_bytes;
    }
    stream.get_parameters(arrays);
    std::memcpy(&bytes[header_bytes], aligned.data(), total - header_bytes);
    swap_bytes(reinterpret_cast<uint8_t*>(&bytes[header_bytes]), total - header_bytes, number_bytes);
    append(bytes, crc32(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
    return bytes;
}

std::unique_ptr<AnyStream> read_stream(const void* data, size_t size, int64_t B) {
    const auto* const bytes = static_cast<const uint8_t*>(data);
    if (size < sizeof(magic) || std::memcmp(bytes, magic, sizeof(magic)) != 0) fail("this is no model of rnnfast");
    if (size < header_bytes + checksum_bytes)
        fail("cut off: expected " + std::to_string(header_bytes + checksum_bytes) + " bytes or more, got " +
             std::to_string(size));
    const uint32_t its_version = number_at<uint32_t>(bytes + 8);
    if (its_version != version)
        throw FileError(FileError::Kind::version, "version of the format: expected " + std::to_string(version) +
                                                      ", got " + std::to_string(its_version));
    if (crc32(bytes, size - checksum_bytes) != number_at<uint32_t>(bytes + size - checksum_bytes))
        throw FileError(FileError::Kind::checksum,
                        "the checksum does not fit: the file is cut off, or some of its bits have changed");
    const uint32_t number_bytes = number_at<uint32_t>(bytes + 12);
    if (number_bytes != 4 && number_bytes != 8)
        fail("bytes of a number: expected 4 or 8, got " + std::to_string(number_bytes));
    const StreamShape shape = read_shape(bytes);
    const size_t payload = size - header_bytes - checksum_bytes;
    if (count_parameters(shape) * number_bytes != payload) fail("the numbers do not fill the file");

    std::unique_ptr<AnyStream> stream = make_stream(shape, int(number_bytes), B);
    Memory aligned(std::max<size_t>(payload, 1));
    uint8_t* at = static_cast<uint8_t*>(aligned.data());
    std::memcpy(at, bytes + header_bytes, payload);
    swap_bytes(at, payload, int(number_bytes));
    std::vector<const void*> arrays;
    for (const int64_t count : stream->parameter_sizes()) {
        arrays.push_back(at);
        at += count * int64_t(number_bytes);
    }
    stream->set_parameters(arrays);
    return stream;
}

}  // namespace rnnfast
