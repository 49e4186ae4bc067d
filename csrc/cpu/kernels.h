// The table of kernels that each instruction set fills. Everything here works on rows given by pointers, so that
// padded, packed, reversed and initial-state rows are all the same to it; threads, time and memory are the driver's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cells/traits.h"
#include "../precision.h"
#include "../unit.h"

// Members that every instruction set's file sees must leave no shared copy behind: the linker would keep any one of
// them.
#define RNNFAST_INLINE inline __attribute__((always_inline))

namespace rnnfast {

// How the columns of a matrix product are cut into panels of up to 4 vectors.
//   gates > 1:  a panel holds one vector of units for each gate; the column of (gate, unit) is gate*size + unit.
//   gates == 1: a panel holds neighbouring vectors; all panels have nearly the same width.
struct Columns {
    int64_t size;       // columns of one gate
    int gates;          // 1 to 4
    int lanes;          // numbers in a vector
    int64_t panels;     // how many
    int64_t first = 0;  // where column 0 is in the rows of c and init

    RNNFAST_INLINE int64_t vectors() const { return (size + lanes - 1) / lanes; }
    RNNFAST_INLINE int64_t first_vector(int64_t panel) const { return gates > 1 ? panel : panel * vectors() / panels; }
    // Numbers that the packed panels of a (K, columns) matrix take; there is room for pairs of rows.
    RNNFAST_INLINE int64_t packed(int64_t K) const { return vectors() * gates * lanes * (K + K % 2); }

    // The same units, some of the gates only.
    RNNFAST_INLINE Columns of(const Slots& slots) const {
        return {size, slots.count, lanes, panels, slots.first * size};
    }

    static RNNFAST_INLINE Columns of_gates(int64_t size, int gates, int lanes) {
        return {size, gates, lanes, (size + lanes - 1) / lanes};
    }
    // At least `min_panels` panels if there are that many vectors, so that as many threads can share the work.
    static RNNFAST_INLINE Columns of_matrix(int64_t size, int lanes, int64_t min_panels) {
        const int64_t vectors = (size + lanes - 1) / lanes;
        const int64_t fewest = (vectors + 3) / 4;
        const int64_t wanted = fewest > min_panels ? fewest : min_panels;
        return {size, 1, lanes, vectors < wanted ? vectors : wanted};
    }
};

// c[r][j] = init[r][j] + sum_k a[r][k * a_stride] * W(k, j) for rows r in [0, rows), panels [panel0, panel1), where
// c and init are counted from columns.first on.
template <class T>
struct Product {
    int64_t rows;
    int64_t K;
    const T* const* a;
    ptrdiff_t a_stride;
    Columns columns;
    int64_t panel0, panel1;
    const T* packed;       // W, see pack_rows()
    const T* const* init;  // nullptr: zeros; may be c
    T* const* c;
};

// A weight as it lies in memory, one matrix for each gate; nullptr: not for this gate.
struct Matrices {
    const void* const* gates;
    bool bfloat16;  // its numbers in place of float32
};

// The same sum over two matrices that lie as they are, not packed: for column j of gate g, c[r][g * size + j] =
// init[r][g * size + j] + sum over both i of sum_k a[i][r][k] * w[i][g][j * K[i] + k]. For so few rows that packing
// would cost more than it saves.
template <class T>
struct DirectProduct {
    int64_t rows;
    int64_t K[2];  // 0: only the other one
    const T* const* a[2];
    Matrices w[2];  // of the same numbers
    Columns columns;
    int64_t panel0, panel1;
    const T* const* init;  // nullptr: zeros
    T* const* c;
};

// One step of a cell, see csrc/cells: the gates take the place of z, then they meet the state, which is c or h. A cell
// whose gate is h itself has its z in the rows of h, and neither state nor other rows.
template <class T>
struct Step {
    Product<T> product;      // into the recurrent gates of z rows (G,H)
    const T* const* c_prev;  // rows (H), of the state
    T* const* c;             // rows (H), may be c_prev; only of c
    T* const* m;             // rows (H): h, or what is projected to h
    const T* unit;           // (U,H)
};

// dm = product, then dz of the gates and dc of the step before.
template <class T>
struct StepBackward {
    Product<T> product;      // into dm rows (H); K == 0: dm = init
    const T* const* gates;   // rows (G,H), activated
    const T* const* c;       // rows (H); only of c
    const T* const* c_prev;  // rows (H), of the state
    T* const* dc;            // rows (H), in: dL/d state carried from t+1; out: the same of t-1
    T* const* dz;            // rows (G+U,H): of the gates, then of the unit parameters; of one gate also the rows of dm
    T* const* dc_total;      // rows (H), all of dL/d state, or nullptr: not wanted; of h may be dm
    const T* unit;           // (U,H)
};

// Tangents of one step: z_dot = product, then c_dot and m_dot.
template <class T>
struct StepTangent {
    Product<T> product;          // into z_dot rows (G,H), of one gate also the rows of m_dot
    const T* const* gates;       // rows (G,H), activated
    const T* const* c_prev;      // rows (H), of the state
    const T* const* c_dot_prev;  // rows (H), of the state
    T* const* c_dot;             // rows (H); only of c
    T* const* m_dot;             // rows (H)
    const T* unit;               // (U,H)
    const T* unit_dot;           // (U,H)
};

// The same for a second derivative, along the gradients that a backward pass has left for c_t and m_t: what
// dL/dc_t c_dot_t + dL/dm_t m_dot_t changes by with z_t (or with h_t, if that is the gate), the states of t and t-1,
// and the unit parameters.
template <class T>
struct StepSecond {
    StepTangent<T> tangent;
    const T* const* c;   // rows (H); only of c
    const T* const* dc;  // rows (H), all of dL/dc_t; only of c
    const T* const* dm;  // rows (H)
    T* const* d_gates;   // rows (G,H)
    T* const* d_c;       // rows (H), of the state
    T* const* d_c_prev;  // rows (H), of the state, which is added to
    T* const* d_unit;    // rows (U,H)
};

// A step and its tangents together: the product is that of `step`, of n rows of values and then as many of tangents.
template <class T>
struct StepDual {
    Step<T> step;
    StepTangent<T> tangent;  // without a product of its own
};

// Columns of a product of a stream are packed in groups of so many vectors: (group,K,vector of the group,lane).
constexpr int affine_group = 8;

// out[r] = bias + W a[r] for few rows r, in groups [group0, group1) of columns. W is packed, bias and out have whole
// vectors.
template <class T>
struct Affine {
    int64_t rows, K;
    const T* a;  // (rows,K), a_stride numbers from row to row
    ptrdiff_t a_stride;
    int64_t vectors;  // of columns
    int64_t group0, group1;
    const T* packed;
    const T* bias;  // (vectors,V)
    T* out;         // (rows,vectors,V), out_stride numbers from row to row
    ptrdiff_t out_stride;
};

// The cell of a stream's step, of vectors [vector0, vector1) of units. All rows have whole vectors.
template <class T>
struct StreamStep {
    int64_t rows, vector0, vector1;
    const T* z_x;  // rows (H/V,Cell::input_gates,V), what the input brings
    ptrdiff_t z_x_stride;
    const T* z_h;  // rows (H/V,Cell::recurrent_gates,V), what h_{t-1} brings
    ptrdiff_t z_h_stride;
    const T* unit;    // (H/V,U,V) unit parameters
    const T* c_prev;  // rows (H) of the state, may be c
    T* c;             // rows (H), of a cell with a state of its own
    ptrdiff_t c_stride;
    T* m;  // rows (H): h, or what is projected to h
    ptrdiff_t m_stride;
};

// What one instruction set does for one cell.
template <class T>
struct CellKernels {
    void (*step)(const Step<T>&);
    void (*step_backward)(const StepBackward<T>&);
    void (*step_tangent)(const StepTangent<T>&);
    void (*step_dual)(const StepDual<T>&);
    // Second derivatives and streams take products with all bits: nullptr in a table of fewer.
    void (*step_second)(const StepSecond<T>&);
    void (*stream_step)(const StreamStep<T>&);
};

// Units of a reservoir: h = (1 - leak) h_prev + leak f(h + scale * sum) + noise, where `sum` is the recurrent product.
template <class T>
struct LeakyRows {
    Unit unit;
    const T* leak;           // [rows]
    const T* scale;          // [rows]
    const T* const* h_prev;  // rows (H)
    const T* const* noise;   // rows (H), or nullptr
    T* const* h;             // rows (H), in: W_in x + b
};

// The recurrent product with a dense matrix.
template <class T>
struct DenseReservoirStep {
    Product<T> product;  // into rows of working memory
    LeakyRows<T> leaky;
};

// The recurrent product with a sparse matrix of `run_length` neighbouring units each that hear as many neighbours: see
// Reservoirs. Of units [vector0, vector1) * lanes.
template <class T>
struct SparseReservoirStep {
    int64_t rows, H, F;
    int64_t vector0, vector1;
    const float* w;             // (H/run_length,F,run_length), units that fill up the last run have zeros
    const int32_t* starts;      // (H/run_length,F)
    const T* const* ring_prev;  // rows (H + run_length): h_prev, and again from its start on
    T* const* ring;             // rows (H + run_length): h likewise
    LeakyRows<T> leaky;
};

// The same for many rows: lanes are rows, and what is loaded is always whole vectors of the same unit.
template <class T>
struct WideReservoirStep {
    int64_t rows, H, F;
    int64_t vector0, vector1;  // of units
    const float* w;            // (H/run_length,F,run_length)
    const int32_t* starts;     // (H/run_length,F)
    const T* across_prev;      // (H + run_length,stride): h_prev, and again from its start on; finite where no row is
    T* across;                 // (H + run_length,stride): h likewise
    int64_t stride;            // rows, rounded up to full vectors
    LeakyRows<T> leaky;
};

// What a product costs, for plans.
struct ProductCosts {
    int tile_rows;  // rows of c that a tile holds
    double bytes;   // of a packed number
    double speed;   // multiply-adds beside those of numbers as they are, on the same CPU
};

template <class T>
struct Kernels {
    int lanes;
    ProductCosts costs;
    // Put panels [panel0, panel1) of a (K, columns) matrix side by side; columns that fill up a vector are zeros.
    // packed(k, j) = w[g][j * stride + k] for column j of gate g
    void (*pack_transposed)(const Columns&, int64_t K, const Matrices& w, ptrdiff_t stride, int64_t panel0,
                            int64_t panel1, T* packed);
    // packed(k, j) = rows[k][j]
    void (*pack_rows)(const Columns&, int64_t K, const T* const* rows, int64_t panel0, int64_t panel1, T* packed);
    void (*product)(const Product<T>&);
    void (*direct_product)(const DirectProduct<T>&);
    const CellKernels<T>* cells;  // by Cell::index
    // sums[j] += sum_r rows[r][j] for r in [0, count), j in [0, size), one partial sum for all rows
    void (*add_rows)(int64_t count, const T* rows, ptrdiff_t stride, int64_t size, T* sums);
    // Runs `rounds` rounds of independent multiply-adds; returns the number of floating-point operations done.
    int64_t (*burn)(int64_t rounds);
    // Streams and reservoirs, whose products have all bits: nullptr in a table of fewer.
    void (*affine)(const Affine<T>&);
    void (*dense_reservoir_step)(const DenseReservoirStep<T>&);
    void (*sparse_reservoir_step)(const SparseReservoirStep<T>&);
    void (*wide_reservoir_step)(const WideReservoirStep<T>&);
};

// Kernels of the instruction set in use.
template <class T>
const Kernels<T>& kernels();

// The same for cells of H units, of which half a vector of AVX-512 may hold all: then AVX2's; and with products of
// fewer bits, where there are instructions for them.
template <class T>
const Kernels<T>& kernels_for(int64_t H, Precision precision = Precision::highest);

}  // namespace rnnfast
