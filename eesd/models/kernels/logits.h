// What is read off logits. In one thread: a row is done before another would have begun.
#pragma once

#include <algorithm>
#include <cmath>

#include "tile.h"

namespace {

// Of q = softmax(x), x [count]: its largest share, and its entropy -sum q log q in nats.
void softmax_statistics(const float* x, int64_t count, float& share, float& entropy) {
    float tops[16];
    std::fill(tops, tops + 16, x[0]);
    int64_t even = count / 16 * 16;
    for (int64_t j = 0; j < even; j += 16)
        for (int i = 0; i < 16; i++) tops[i] = x[j + i] > tops[i] ? x[j + i] : tops[i];
    for (int64_t j = even; j < count; j++) tops[0] = std::max(tops[0], x[j]);
    float top = *std::max_element(tops, tops + 16), sum = 0, mean = 0;
    vf sums = all(0), means = all(0);
    for (int64_t j = 0; j < even; j += LANES) {
        vf below = load(x + j) - top, weight = exponential(below);
        sums += weight;
        vi none = weight == 0.0f;  // x may be -inf
        means += (vf)((vi)(weight * below) & ~none);
    }
    for (int i = 0; i < LANES; i++) sum += sums[i], mean += means[i];
    for (int64_t j = even; j < count; j++) {
        float weight = exponential(all(x[j] - top))[0];
        sum += weight, mean += weight == 0.0f ? 0.0f : weight * (x[j] - top);
    }
    share = 1 / sum, entropy = std::log(sum) - mean / sum;
}

// Which of x [count] is the first of the greatest. As torch has it, what is no number is greater than all that are.
int64_t first_greatest(const float* x, int64_t count) {
    constexpr int64_t BLOCK = 64 * LANES;
    float top = x[0];
    int64_t found = 0;  // the block of it
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t end = std::min(start + BLOCK, count), even = start + (end - start) / LANES * LANES;
        vf tops = all(x[start]);
        vi strange{};
        for (int64_t j = start; j < even; j += LANES) {
            vf value = load(x + j);
            tops = value > tops ? value : tops;
            strange |= value != value;
        }
        float most = x[start];
        bool any = false;
        for (int i = 0; i < LANES; i++) most = std::max(most, tops[i]), any = any || strange[i];
        for (int64_t j = even; j < end; j++) most = std::max(most, x[j]), any = any || x[j] != x[j];
        if (any) return std::find_if(x + start, x + end, [](float value) { return value != value; }) - x;
        if (most > top) top = most, found = start;
    }
    return std::find(x + found, x + count, top) - x;
}

}  // namespace
