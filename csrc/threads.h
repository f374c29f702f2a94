// A loop over threads: in the OpenMP pool of the process where it was handed over, else in threads made for the call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace threads {

// libgomp's interface, which LLVM's and Intel's runtimes offer too. With entry points instead of -fopenmp the extension joins
// the pool that PyTorch brought, whichever library that is, rather than load a second one whose threads compete with it.
struct Pool {
    void (*parallel)(void (*work)(void*), void* data, unsigned num_threads, unsigned flags) = nullptr;
    int (*index)() = nullptr;
    int (*count)() = nullptr;
};

inline Pool pool;

// Calls work(first, last) on contiguous parts of 0 .. count, one a thread.
template <typename Work>
void parallel(int64_t count, int num_threads, const Work& work) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(num_threads, count));
    if (parts == 1) {
        work(0, count);
    } else if (pool.parallel) {
        struct Region {
            const Work& work;
            int64_t count;
        } region{work, count};
        const auto run = [](void* data) {
            const Region& shared = *static_cast<Region*>(data);
            const int64_t part = pool.index(), parts = pool.count();  // the pool may give fewer than were asked for
            shared.work(shared.count * part / parts, shared.count * (part + 1) / parts);
        };
        pool.parallel(run, &region, static_cast<unsigned>(parts), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t part = 1; part < parts; ++part) {
            others.emplace_back(work, count * part / parts, count * (part + 1) / parts);
        }
        work(0, count / parts);
        for (std::thread& thread : others) thread.join();
    }
}

}  // namespace threads
