// Executes a decoded PTX program on a CPU, a warp at a time. The README beside this folder says what is modelled.

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <limits>
#include <type_traits>

#include "state.hpp"

namespace {

#include "values.inc"
#include "lanes.inc"
#include "arithmetic.inc"
#include "global.inc"
#include "shared.inc"
#include "warp.inc"
#include "matrix.inc"
#include "asynchronous.inc"

template <class F> void each_operation(F use) {
    for (const Operation& x : ARITHMETIC) use(x);
    for (const Operation& x : MEMORY) use(x);
    for (const Operation& x : CONTROL) use(x);
    for (const Operation& x : MATRIX) use(x);
    for (const Operation& x : ASYNCHRONOUS) use(x);
}

const std::vector<Operation>& operations() {
    static const std::vector<Operation> all = [] {
        std::vector<Operation> found;
        each_operation([&](const Operation& x) { found.push_back(x); });
        return found;
    }();
    return all;
}

bool is_product(Handler handler) {
    return handler == multiply_asynchronously<float> || handler == multiply_asynchronously<Half> ||
           handler == multiply_asynchronously<Brain>;
}

// What must be known of the registers of a program with wgmma.
void note_registers(Warp& w, const Instruction& i, const uint32_t* o, Handler handler) {
    ++w.clock;
    const bool product = is_product(handler);
    if (!w.pending.empty()) check_registers(w, i, o, product);
    if (!product)
        for (int k = 0; k < i.results; ++k) w.written[o[k]] = w.clock;
}

// Run a warp until it comes to a barrier or has ended.
void run(Warp& w) {
    const Program& program = w.cta->program;
    const Operation* const table = operations().data();
    w.at_barrier = false;
    w.cta->running = &w;
    while (w.alive && !w.at_barrier) {
        if (w.next >= w.meeting) regroup(w);
        const Instruction& i = program.code[w.next++];
        const Operation& operation = table[i.operation];
        uint32_t mask = w.active;
        if (i.guard >= 0) mask &= i.negated ? ~w.mask_of(i.guard) : w.mask_of(i.guard);
        Counters& counters = w.cta->launch.counters[&i - program.code];
        ++counters.issued;
        if (!mask) continue;
        counters.lanes += __builtin_popcount(mask);
        if (operation.whole_warp && mask != ALL) fail("divergence", "executed by some lanes of the warp only");
        const uint32_t* o = program.operands + i.operands;
        if (program.asynchronous) note_registers(w, i, o, operation.handler);
        operation.handler(w, i, o, mask);
    }
}

void run_cta(Cta& c) {
    const int n = c.program.warps;
    for (int k = 0; k < n; ++k) {
        Warp& w = c.warps[k];
        // What a register holds that was never written must change no result: two kinds of garbage show whether it does.
        std::fill(w.registers.begin(), w.registers.end(), uint8_t(c.launch.reverse ? 0xa5 : 0x7f));
        w.next = 0, w.active = w.alive = ALL, w.meeting = INT32_MAX;
        w.others.clear(), w.pending.clear();
        w.fence_time = w.fence_epoch = w.clock = w.fenced = w.groups = 0;
        std::fill(w.written.begin(), w.written.end(), 0);
    }
    for (;;) {
        int waiting = 0, ended = 0;
        for (int k = 0; k < n; ++k) {
            Warp& w = c.warps[c.launch.reverse ? n - 1 - k : k];
            if (w.alive) run(w);
            (w.alive ? waiting : ended) += 1;
        }
        if (!waiting) return;
        if (ended) fail("deadlock", "some warps wait at a barrier and others have ended");
        ++c.epoch;
    }
}

void run_grid(Cta& c) {
    const int32_t* grid = c.launch.grid;
    const uint32_t n = uint32_t(grid[0]) * grid[1] * grid[2];
    std::unordered_set<uint64_t> everywhere;
    for (uint32_t k = 0; k < n; ++k) {
        const uint32_t at = c.launch.reverse ? n - 1 - k : k;
        c.index[0] = at % grid[0], c.index[1] = at / grid[0] % grid[1], c.index[2] = at / grid[0] / grid[1];
        c.id = at + 1;
        ++c.epoch;
        run_cta(c);
        if (c.launch.counting) {
            c.launch.totals[0] += c.sectors->size();
            everywhere.insert(c.sectors->begin(), c.sectors->end());
            c.sectors->clear();
        }
    }
    c.launch.totals[1] = everywhere.size();
}

} // namespace

extern "C" {

int fedrot_find_operation(const char* name) {
    const auto& all = operations();
    for (size_t k = 0; k < all.size(); ++k)
        if (!std::strcmp(all[k].name, name)) return int(k);
    return -1;
}

// 0, or 1 with a report of what the program did wrong.
int fedrot_execute(const Program* program, const Launch* launch, Report* report) {
    std::vector<Trace> traces(launch->n_traces), shared_traces((program->shared_bytes >> program->shared_granule) + 1);
    std::vector<uint32_t> recent(program->length);
    std::vector<uint8_t> shared(program->shared_bytes);
    std::vector<uint16_t> readers(program->shared_bytes / 16 + 1);
    std::vector<Warp> warps(program->warps);
    std::unordered_set<uint64_t> sectors;
    Cta cta{*program, *launch, traces, recent, shared, shared_traces, readers, warps, &sectors};
    for (int k = 0; k < program->warps; ++k) {
        warps[k].cta = &cta, warps[k].id = k;
        warps[k].registers.resize(size_t(program->slots) * SLOT);
        warps[k].written.resize(program->slots);
    }
    try {
        run_grid(cta);
        return 0;
    } catch (const Fault& fault) {
        std::snprintf(report->kind, sizeof report->kind, "%s", fault.kind.c_str());
        std::snprintf(report->detail, sizeof report->detail, "%s", fault.detail.c_str());
        report->instruction = cta.running->next - 1;
        report->cta = int(cta.id) - 1, report->warp = cta.running->id, report->lane = fault.lane;
        return 1;
    }
}
}
