/* A recurrent network that answers step by step, in C: no Python, no torch. rnnfast.Stream(layer).save("model.rnn")
 * writes what rnnfast_open() reads. docs/stream.md has the format of the file and a worked example.
 *
 * Dims legend: B batch, I input size, H hidden size, L layers, R size of h (P if projected, else H), O outputs: those
 * of the readout if the model has one, else R. Arrays are dense and row-major, of the model's own type of numbers.
 *
 * Only opening and closing allocate memory and read files. Everything else takes no lock, calls no system and is as
 * long as its sums are, so it may run on a real-time thread. One stream serves one thread at a time; any number of
 * streams may run side by side.
 */
#ifndef RNNFAST_STREAM_H
#define RNNFAST_STREAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rnnfast_stream rnnfast_stream;

typedef enum {
    RNNFAST_OK = 0,
    RNNFAST_ARGUMENT = 1, /* a null pointer, or a number out of range */
    RNNFAST_FILE = 2,     /* the file cannot be read */
    RNNFAST_FORMAT = 3,   /* it is no model */
    RNNFAST_VERSION = 4,  /* it is of another version of the format */
    RNNFAST_CHECKSUM = 5, /* it is cut off, or some of its bits have changed */
    RNNFAST_TYPE = 6,     /* the model has the other type of numbers */
    RNNFAST_MEMORY = 7    /* there is not enough memory */
} rnnfast_status;

typedef struct {
    rnnfast_status status;
    char message[248]; /* what was given and what was expected, ends with 0 */
} rnnfast_error;

typedef struct {
    int64_t batch_size, input_size, hidden_size, num_layers, state_size, output_size; /* B, I, H, L, R, O */
    int number_bytes;                                                                 /* 4: float, 8: double */
    int has_cell_state;                                                               /* is there a c beside h? */
} rnnfast_sizes;

/* Opens a model for batch_size sequences at once, all states zero. Returns NULL on failure and says why in `error`,
 * which may be NULL. */
rnnfast_stream* rnnfast_open(const char* path, int64_t batch_size, rnnfast_error* error);
/* The same for a file that is in memory already; the bytes are not needed any more afterwards. */
rnnfast_stream* rnnfast_open_bytes(const void* bytes, size_t size, int64_t batch_size, rnnfast_error* error);
/* Takes NULL, too. */
void rnnfast_close(rnnfast_stream* stream);

rnnfast_status rnnfast_get_sizes(const rnnfast_stream* stream, rnnfast_sizes* sizes);

/* One step: x (B,I) -> y (B,O). y may be x if O = I. */
rnnfast_status rnnfast_step(rnnfast_stream* stream, const float* x, float* y);
rnnfast_status rnnfast_step_double(rnnfast_stream* stream, const double* x, double* y);
/* `count` steps, faster than one by one, to the same bits: x (count,B,I) -> y (count,B,O). y may be x if O = I. */
rnnfast_status rnnfast_steps(rnnfast_stream* stream, int64_t count, const float* x, float* y);
rnnfast_status rnnfast_steps_double(rnnfast_stream* stream, int64_t count, const double* x, double* y);

/* Sets the state of sequence b to zero where mask[b] is not 0; mask (B), NULL: of all. */
rnnfast_status rnnfast_reset(rnnfast_stream* stream, const unsigned char* mask);
/* h (L,B,R), c (L,B,H); c is not looked at if the model has none. */
rnnfast_status rnnfast_state(const rnnfast_stream* stream, float* h, float* c);
rnnfast_status rnnfast_state_double(const rnnfast_stream* stream, double* h, double* c);
rnnfast_status rnnfast_set_state(rnnfast_stream* stream, const float* h, const float* c);
rnnfast_status rnnfast_set_state_double(rnnfast_stream* stream, const double* h, const double* c);

/* A few words on a status. */
const char* rnnfast_status_text(rnnfast_status status);

#ifdef __cplusplus
}
#endif

#endif
