/* An audio effect at 48 kHz: a small recurrent network between standard input and standard output, float32 samples of
 * one channel. It answers in blocks of a millisecond, as a sound card asks for them, and says how long the slowest one
 * took.
 *
 *     ./effect effect.rnn < in.f32 > out.f32
 */
#include <rnnfast/stream.h>
#include <stdio.h>
#include <time.h>

enum { BLOCK = 48 };

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int count, char** arguments) {
    float x[BLOCK], y[BLOCK];
    double slowest = 0, all = 0;
    size_t samples = 0, got;
    rnnfast_error error;
    rnnfast_sizes sizes;
    rnnfast_stream* effect;

    if (count != 2) {
        fprintf(stderr, "usage: %s MODEL < in.f32 > out.f32\n", arguments[0]);
        return 2;
    }
    effect = rnnfast_open(arguments[1], 1, &error);
    if (!effect) {
        fprintf(stderr, "%s: %s\n", arguments[1], error.message);
        return 1;
    }
    rnnfast_get_sizes(effect, &sizes);
    if (sizes.input_size != 1 || sizes.output_size != 1) {
        fprintf(stderr, "%s: expected one sample in and one out\n", arguments[1]);
        rnnfast_close(effect);
        return 1;
    }

    while ((got = fread(x, sizeof(float), BLOCK, stdin)) > 0) {
        const double start = seconds();
        const rnnfast_status status = rnnfast_steps(effect, (int64_t)got, x, y);
        const double took = seconds() - start;
        if (status != RNNFAST_OK) {
            fprintf(stderr, "%s\n", rnnfast_status_text(status));
            rnnfast_close(effect);
            return 1;
        }
        slowest = took > slowest ? took : slowest;
        all += took;
        samples += got;
        if (fwrite(y, sizeof(float), got, stdout) != got) {
            perror("standard output");
            rnnfast_close(effect);
            return 1;
        }
    }
    rnnfast_close(effect);
    fprintf(stderr, "%lu samples, %.3f us each, %.1f times as fast as they are played; slowest block %.1f us of 1000\n",
            (unsigned long)samples, samples ? all / (double)samples * 1e6 : 0,
            samples ? (double)samples / 48000 / all : 0, slowest * 1e6);
    return 0;
}
