// Runs the functions of a build of the compiled step for another process: how tests reach a build for another processor,
// under an emulator.
//
//     remote_step LIBRARY FILE BYTES
//
// maps the file, writes the address of that memory to its standard output, and then the result of every call that it reads
// from its standard input: eight arguments, the length of a name, the name. Numbers are 64 bits wide.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

bool read_all(void* to, size_t bytes) {
    for (char* at = static_cast<char*>(to); bytes;) {
        const ssize_t count = read(0, at, bytes);
        if (count <= 0) return false;
        at += count, bytes -= size_t(count);
    }
    return true;
}

bool answer(int64_t n) { return write(1, &n, sizeof n) == sizeof n; }

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    const int file = open(arguments[2], O_RDWR);
    void* room = mmap(nullptr, size_t(atoll(arguments[3])), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (room == MAP_FAILED || !answer(reinterpret_cast<int64_t>(room))) return 1;
    int64_t a[9];
    char name[64] = {};
    while (read_all(a, sizeof a) && a[8] < int64_t(sizeof name) && read_all(name, size_t(a[8]))) {
        name[a[8]] = 0;
        using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
        const Function function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function || !answer(function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]))) return 1;
    }
}
