// A stream's weights as a file. Little-endian, without gaps:
//    0  8 bytes   "RNNFAST" and a zero
//    8  uint32    version, 1
//   12  uint32    bytes of a number, 4 or 8 (IEEE 754)
//   16  16 bytes  name of the cell, filled up with zeros
//   32  int64     I, H, P, L, O of StreamShape
//   72  uint32    1 if layers are biased, plus 2 if the readout is
//   76  uint32    0
//   80  numbers   parameters in the order of AnyStream
//  end  uint32    CRC-32 (zlib's) of everything before
#pragma once

#include <stdexcept>
#include <string>

#include "stream.h"

namespace rnnfast {

class FileError : public std::runtime_error {
public:
    enum class Kind { format, version, checksum };

    FileError(Kind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
    const Kind kind;
};

// A stream of numbers of 4 or 8 bytes, all of them zeros. Throws std::invalid_argument for sizes out of range,
// std::bad_alloc.
std::unique_ptr<AnyStream> make_stream(const StreamShape& shape, int number_bytes, int64_t B);

std::string write_stream(const AnyStream& stream);
// Throws FileError, std::invalid_argument for B, std::bad_alloc.
std::unique_ptr<AnyStream> read_stream(const void* bytes, size_t size, int64_t B);

}  // namespace rnnfast
