// The decode path on CPUs: a range of layers, or norm and head, for a few query rows in one call.
//
// A token's time is the time to read the weights, so they are read once, in order, as packed panels (tile.h), by
// threads that meet at a handful of barriers a layer. Called by eesd/models/engine.py; the structs mirror its ctypes.
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <vector>

#include "attention.h"
#include "logits.h"

namespace {

// Buffers live as long as their thread: a call allocates nothing unless it is larger than all before it.
float* scratch(int which, size_t size) {
    static thread_local std::vector<float> buffers[14];
    auto& buffer = buffers[which];
    if (buffer.size() < size + 16) buffer.assign(size + 16, 0.0f);
    auto address = reinterpret_cast<uintptr_t>(buffer.data());
    return buffer.data() + (64 - address % 64) % 64 / 4;
}

class Barrier {
    std::atomic<int> arrived_{0}, round_{0};

   public:
    void wait(int threads) {
        if (threads == 1) return;
        int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        // Spinning is right while every thread has a core; who waits long shares one with somebody.
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
            if (spins > 2000) sched_yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

// A thread's place in a parallel region; `arrived`: of this region, 0 before it.
Place take_place(std::atomic<int>& arrived) {
#if defined(__clang__)
    // Its threads are of another runtime than torch's, whose functions, loaded first, would answer for them.
    int thread = arrived.fetch_add(1);
#pragma omp barrier
    return {thread, arrived.load()};
#else
    (void)arrived;
    return {omp_get_thread_num(), omp_get_num_threads()};
#endif
}

void read_states(const void* input, bool is_bf16, int rows, int hidden, float* states, size_t stride) {
    for (int r = 0; r < rows; r++) {
        size_t at = size_t(r) * hidden;
        if (is_bf16)
            widen(states + r * stride, static_cast<const bf16*>(input) + at, hidden);
        else
            put(states + r * stride, static_cast<const float*>(input) + at, hidden);
    }
}

void write_states(const float* states, size_t stride, bool is_bf16, int rows, int hidden, void* output) {
    for (int r = 0; r < rows; r++) {
        size_t at = size_t(r) * hidden;
        if (is_bf16)
            put(static_cast<bf16*>(output) + at, states + r * stride, hidden);
        else
            put(static_cast<float*>(output) + at, states + r * stride, hidden);
    }
}

constexpr int PAIRS_AT_ONCE = 4;  // of panels of gate and up: what they give is used before it leaves the caches
constexpr int BOTH_ROW = 2 * PAIRS_AT_ONCE * PANEL;

// A share of gate and up, and silu(gate) * up for it: panels of the two alternate. `both`: room for the rows of some.
void gate_up(const Layer& layer, Part pairs, Rows x, float* both, Activations active, Tiles& tiles) {
    float value[PANEL];
    for (int first = pairs.first; first < pairs.last; first += PAIRS_AT_ONCE) {
        Part piece{first, std::min(first + PAIRS_AT_ONCE, pairs.last)};
        product(slice(layer.gate_up, {2 * piece.first, 2 * piece.last}), {0, 2 * piece.size()}, x,
                {both, BOTH_ROW, false}, tiles);
        for (int r = 0; r < x.count; r++)
            for (int p = piece.first; p < piece.last; p++) {
                const float* gates = both + r * BOTH_ROW + 2 * (p - first) * PANEL;
                for (int i = 0; i < PANEL; i += LANES) {
                    vf gate = load(gates + i), up = load(gates + PANEL + i), minus = -gate;
                    minus = minus > 80.0f ? all(80.0f) : minus;
                    store(value + i, gate / (all(1.0f) + exponential(minus)) * up);
                }
                active.put(layer.down.format, r, p * PANEL, value, PANEL);
            }
    }
}

}  // namespace

extern "C" {

int eesd_panel() { return PANEL; }

int eesd_takes_pairs() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

const char* eesd_simd() {
    if (tiles_allowed()) return "amx";
#if defined(__AVX512BF16__)
    return "avx512bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "generic";
#endif
}

// Run `count` layers on rows of states; see `Call`.
static void run_layers(const Shape* shape, const Layer* const* layers, int count, const Call* call) {
    const Shape& s = *shape;
    int rows = call->batch * call->seq, queries = call->seq * (s.heads / s.kv_heads);
    size_t hidden_row = padded(s.hidden), active_row = padded(s.intermediate), dim_row = padded(s.dim);
    size_t qkv_row = padded(size_t(s.heads + 2 * s.kv_heads) * s.dim), attended_row = padded(size_t(s.heads) * s.dim);
    std::vector<int> live(call->batch, 0);
    for (int r = 0; r < rows; r++) live[r / call->seq] = std::max(live[r / call->seq], call->slots[r] + 1);
    int chunks = chunk_count(*std::max_element(live.begin(), live.end()));

    bool rounded = false;
    for (const Matrix* m : {&layers[0]->qkv, &layers[0]->o, &layers[0]->gate_up, &layers[0]->down})
        rounded = rounded || m->format == PAIRS;
    auto narrow = [&](int which, size_t size) { return rounded ? reinterpret_cast<bf16*>(scratch(which, size / 2)) : nullptr; };
    float* states = scratch(0, rows * hidden_row);
    float* qkv = scratch(1, rows * qkv_row);
    Activations attended{scratch(2, rows * attended_row), narrow(8, rows * attended_row), attended_row};
    Activations active{scratch(4, rows * active_row), narrow(9, rows * active_row), active_row};
    const bool together = shares_queries(s, *call);
    const size_t partial_row = Attention::partial_row(s.dim), joined = queries * partial_row;
    float* partial = scratch(5, together ? call->threads * joined : size_t(rows) * s.heads * chunks * partial_row);
    size_t own_size = 3 * rows * hidden_row / 2 + size_t(rows) * BOTH_ROW + size_t(queries) * s.dim * 3 / 2;
    own_size += CHUNK * (dim_row + QUERIES) + size_t(QUERIES) * (partial_row + std::max(s.dim, CHUNK) / 2);
    own_size = padded(own_size);
    float* own_all = scratch(6, own_size * call->threads);
    Barrier barrier;
    std::atomic<int> arrived{0};

#pragma omp parallel num_threads(call->threads)
    {
        const Place place = take_place(arrived);
        const int thread = place.thread, threads = place.threads;
        float* own_data = own_all + own_size * thread;
        // Every thread norms all rows itself: cheaper than to wait.
        Activations normed{own_data, rounded ? reinterpret_cast<bf16*>(own_data + rows * hidden_row) : nullptr, hidden_row};
        float* both = own_data + 3 * rows * hidden_row / 2;
        float* own_queries = both + size_t(rows) * BOTH_ROW;
        float* chunk_values = own_queries + size_t(queries) * s.dim;
        float* scores = chunk_values + CHUNK * dim_row;
        float* room = scores + CHUNK * QUERIES;
        bf16* narrow_factors = reinterpret_cast<bf16*>(room + QUERIES * partial_row);
        bf16* narrow_queries = narrow_factors + QUERIES * std::max(s.dim, CHUNK);
        Tiles tiles(s.is_bf16 || rounded);
        auto share = [&](int n) { return part(n, thread, threads); };
        auto norm = [&](const float* weight) {
            for (int r = 0; r < rows; r++) {
                rms_norm(states + r * hidden_row, weight, normed.data + r * hidden_row, s.hidden, s.eps);
                normed.round(r, 0, s.hidden);
            }
        };
        if (thread == 0) read_states(call->input, s.is_bf16, rows, s.hidden, states, hidden_row);
        barrier.wait(threads);
        for (int i = 0; i < count; i++) {
            const Layer& layer = *layers[i];
            Part own = share(panel_count(layer.down));  // of o too: both have the states as their outputs
            if (layer.qkv.data) {
                norm(layer.attn_norm);
                product(layer.qkv, share(panel_count(layer.qkv)), normed.rows(rows), {qkv, qkv_row, false}, tiles);
                barrier.wait(threads);
                char* keys = static_cast<char*>(call->keys) + i * call->key_layer;
                char* values = static_cast<char*>(call->values) + i * call->key_layer;
                float* results = partial + (together ? thread * joined : 0);
                Attention a{s,      *call,       layer,        qkv,    qkv_row, keys,           values,         attended, together,
                            results, chunks, own_queries, chunk_values, scores, room, narrow_factors, narrow_queries, tiles};
                auto wait = [&] { barrier.wait(threads); };
                s.is_bf16 ? attend<bf16>(a, live.data(), place, wait) : attend<float>(a, live.data(), place, wait);
                barrier.wait(threads);
                product(layer.o, own, attended.rows(rows), {states, hidden_row, true}, tiles);
                barrier.wait(threads);
            }
            if (layer.gate_up.data) {
                norm(layer.mlp_norm);
                Part gated = share(panel_count(layer.gate_up) / 2);
                gate_up(layer, gated, normed.rows(rows), both, active, tiles);
                barrier.wait(threads);
                product(layer.down, own, active.rows(rows), {states, hidden_row, true}, tiles);
            }
            // Rounded after each layer, so that a range cut in two gives what the whole gives.
            if (s.is_bf16)
                for (int r = 0; r < rows; r++)
                    for (int n = own.first * PANEL; n < own.last * PANEL; n++)
                        states[r * hidden_row + n] = to_float(to_bf16(states[r * hidden_row + n]));
            barrier.wait(threads);
        }
    }
    write_states(states, hidden_row, s.is_bf16, rows, s.hidden, call->output);
}

// `groups` times `each` calls: those of a group one after the other, groups in any order. While there are enough of them
// every thread has groups of its own and waits for nobody within a layer; what remains all share within layers.
void eesd_run_layers(const Shape* shape, const Layer* const* layers, int count, const Call* calls, int groups, int each) {
    const int threads = calls->threads, apart = threads > 1 ? groups / threads * threads : 0;
    auto run = [&](int group, int of) {
        for (int i = group * each; i < (group + 1) * each; i++) {
            Call call = calls[i];
            call.threads = of;
            run_layers(shape, layers, count, &call);
        }
    };
    if (apart) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int group = 0; group < apart; group++) run(group, 1);
    }
    for (int group = apart; group < groups; group++) run(group, threads);
}

// output [rows, out_row] = norm(input [rows, inputs]) times the matrix; no norm where `norm` is null.
void eesd_linear(const Matrix* m, const float* norm, float eps, const void* input, int is_bf16, int rows, float* output,
                 int64_t out_row, int threads) {
    size_t row = padded(m->inputs);
    bf16* narrow = m->format == PAIRS ? reinterpret_cast<bf16*>(scratch(8, rows * row / 2)) : nullptr;
    Activations states{scratch(7, rows * row), narrow, row};
    read_states(input, is_bf16, rows, m->inputs, states.data, row);
    for (int r = 0; r < rows; r++) {
        if (norm) rms_norm(states.data + r * row, norm, states.data + r * row, m->inputs, eps);
        states.round(r, 0, m->inputs);
    }
    std::atomic<int> arrived{0};
#pragma omp parallel num_threads(threads)
    {
        Place place = take_place(arrived);
        Tiles tiles(m->format == PAIRS);
        Part mine = part(panel_count(*m), place.thread, place.threads);
        product(*m, mine, states.rows(rows), {output, size_t(out_row), false}, tiles);
    }
}

// See `softmax_statistics`: both, into `found`.
void eesd_softmax_statistics(const float* x, int64_t count, float* found) {
    softmax_statistics(x, count, found[0], found[1]);
}

struct Exit {  // of eesd/drafting/exit_head.py; without data in fuse there is no context, in estimate no lens
    Layer layer;
    Matrix fuse, estimate;
    const float* norm;
};

// One exit head on rows of states at the exit; see `Call`. For the last `last` rows of every batch row it writes what
// the head takes the target's normalised final states to be, from the states, their contexts and its layer's output.
void eesd_exit_step(const Shape* shape, const Exit* exit, const Call* call, const void* contexts, int last) {
    const Shape& s = *shape;
    int rows = call->batch * call->seq, wanted = call->batch * last, bytes = s.is_bf16 ? 2 : 4;
    size_t row = padded(s.hidden), whole = row * rows, parts_row = exit->estimate.inputs;
    float *states = scratch(10, whole), *fused = scratch(11, whole), *context = scratch(12, whole);
    float* parts = scratch(13, wanted * (parts_row + row));
    float* estimates = parts + wanted * parts_row;
    Call inner = *call;
    read_states(call->input, s.is_bf16, rows, s.hidden, states, row);
    if (exit->fuse.data) {
        read_states(contexts, s.is_bf16, rows, s.hidden, context, row);
        eesd_linear(&exit->fuse, nullptr, 0, contexts, s.is_bf16, rows, fused, row, call->threads);
        for (size_t i = 0; i < whole; i++) fused[i] += states[i];
        inner.input = scratch(3, whole);
        write_states(fused, row, s.is_bf16, rows, s.hidden, inner.input);
    }
    inner.output = fused;
    const Layer* layer = &exit->layer;
    run_layers(shape, &layer, 1, &inner);
    if (!last) return;
    for (int i = 0; i < wanted; i++) {
        int from = i / last * call->seq + call->seq - last + i % last;
        float* part = parts + i * parts_row;
        float* normed = exit->estimate.data ? part + parts_row - s.hidden : estimates + i * row;
        read_states(reinterpret_cast<char*>(fused) + size_t(from) * s.hidden * bytes, s.is_bf16, 1, s.hidden, normed, 0);
        rms_norm(normed, exit->norm, normed, s.hidden, s.eps);
        if (!exit->estimate.data) continue;
        rms_norm(states + from * row, nullptr, part, s.hidden, s.eps);
        if (exit->fuse.data) put(part + s.hidden, context + from * row, s.hidden);
    }
    if (exit->estimate.data) eesd_linear(&exit->estimate, nullptr, 0, parts, 0, wanted, estimates, row, call->threads);
    write_states(estimates, row, s.is_bf16, wanted, s.hidden, call->output);
}

struct Drafting {  // an exit head behind the first `count` layers of its target
    const Shape* shape;
    const Layer* const* layers;
    const Exit* exit;
    const Matrix* head;
    const void* embedding;  // [tokens, hidden], stored as states are
    int32_t count;
};

// One draft step: the state of `token` after the first layers, into `first->output`; then the exit head on the rows of
// `last`, of which that state is the final one, and the draft logits of its estimate.
void eesd_draft_step(const Drafting* d, int64_t token, Call* first, const Call* last, const void* contexts,
                     float* logits) {
    const Shape& s = *d->shape;
    auto embedding = static_cast<const char*>(d->embedding);
    first->input = const_cast<char*>(embedding + size_t(token) * s.hidden * (s.is_bf16 ? 2 : 4));
    run_layers(d->shape, d->layers, d->count, first);
    eesd_exit_step(d->shape, d->exit, last, contexts, 1);
    eesd_linear(d->head, nullptr, 0, last->output, s.is_bf16, 1, logits, panel_count(*d->head) * PANEL, last->threads);
}

struct Passing {  // a model; tokens may have had its first `cut` layers before
    const Shape* shape;
    const Layer* const* layers;
    const Matrix* head;
    const float* norm;
    float eps;
    const void* embedding;  // [tokens, hidden], stored as states are
    int32_t count, cut;
};

// One pass over `call->seq` tokens of one text: their states at the cut, of which the first `done` are there, and into
// `call->output` those after all layers; their logits, and the greatest of each.
void eesd_pass(const Passing* p, const int64_t* tokens, int done, const Call* call, void* states, float* logits,
               int64_t* best) {
    const Shape& s = *p->shape;
    int rows = call->seq, width = panel_count(*p->head) * PANEL;
    size_t row_bytes = size_t(s.hidden) * (s.is_bf16 ? 2 : 4);
    auto state = [&](int row) { return static_cast<char*>(states) + row * row_bytes; };
    for (int r = done; r < rows; r++)
        std::memcpy(state(r), static_cast<const char*>(p->embedding) + tokens[r] * row_bytes, row_bytes);
    if (p->cut && done < rows) {
        Call first = *call;
        first.seq = rows - done;
        first.slots += done, first.positions += done;
        if (call->mask) first.mask += done * call->mask_stride;
        first.input = first.output = state(done);
        run_layers(p->shape, p->layers, p->cut, &first);
    }
    Call rest = *call;
    rest.input = states;
    rest.keys = static_cast<char*>(call->keys) + p->cut * call->key_layer;
    rest.values = static_cast<char*>(call->values) + p->cut * call->key_layer;
    run_layers(p->shape, p->layers + p->cut, p->count - p->cut, &rest);
    eesd_linear(p->head, p->norm, p->eps, call->output, s.is_bf16, rows, logits, width, call->threads);
    for (int r = 0; r < rows; r++) best[r] = first_greatest(logits + size_t(r) * width, p->head->outputs);
}
}
