"""CPU emulation of CUDA kernels: see README.md."""
import ctypes, glob, hashlib, os, re, struct, subprocess, sys, tempfile, time
import numpy as np
import ml_dtypes

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.path.join(HERE, "..", "..", "kernels")
CACHE = os.path.join(tempfile.gettempdir(), "selectivbench-emulator")
GUARD = 4096
PATTERN = np.frombuffer(b"\xfd\xff" * (GUARD // 2), np.uint8)  # NaN as bf16, f32, f64
FLAGS = ["-std=c++17", "-O2", "-g", "-march=native", "-fPIC", "-shared", "-fno-strict-aliasing", "-fno-gnu-unique",
         "-fvisibility=hidden", "-fno-omit-frame-pointer", "-Wall", "-Wno-unused", "-Wno-unknown-pragmas",
         "-Wno-class-memaccess", "-Wno-sign-compare", "-Wno-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
bfloat16 = ml_dtypes.bfloat16


def warn(text):
    print("emu: WARNING: " + text, file=sys.stderr, flush=True)


def bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16)


def empty(shape, dtype=np.float32):
    """An array filled with 0xFF bytes (NaN)."""
    a = np.empty(shape, dtype)
    a.reshape(-1).view(np.uint8)[...] = 0xFF
    return a


def rel(a, ref):
    """Relative RMS error; inf when a has NaNs where ref has none."""
    a, ref = np.asarray(a).astype(np.float64), np.asarray(ref).astype(np.float64)
    if a.shape != ref.shape:
        raise ValueError(f"rel: shapes {a.shape} and {ref.shape}")
    if not np.all(np.isfinite(a)) and np.all(np.isfinite(ref)):
        return float("inf")
    return float(np.sqrt(np.mean((a - ref) ** 2) / max(np.mean(ref ** 2), 1e-300)))


class Map:
    """A bf16 array [batch, rows, heads, columns] as a TensorMap whose boxes are `rows` rows of 64 columns."""

    def __init__(self, array, rows=64):
        self.array, self.rows = array, rows

    def pack(self, address):
        batch, rows, heads, columns = self.array.shape
        return struct.pack("<Q4q2i80x", address, columns, heads, rows, batch, self.rows, 64)


def build(path, defines={}, include=(), sanitize=None):
    path = os.path.abspath(path)
    os.makedirs(CACHE, exist_ok=True)
    if sanitize is None:
        sanitize = os.environ.get("EMU_SAN", "alignment,bounds")
    common = ["-DSB_EMULATE", "-I" + HERE, "-I" + os.path.dirname(path), "-I" + KERNELS]
    common += ["-I" + d for d in include] + [f"-D{k}" if v is None or v is True else f"-D{k}={v}" for k, v in defines.items()]
    flags = FLAGS + ([f"-fsanitize={sanitize}", "-fsanitize-undefined-trap-on-error"] if sanitize else [])
    scan = subprocess.run(["g++", "-std=c++17", "-E", "-P", "-DEMU_SCAN", *common, "-x", "c++", path], capture_output=True, text=True)
    if scan.returncode:
        raise RuntimeError(f"preprocessing {path}:\n{scan.stderr}")
    text = scan.stdout
    attr = r"(?:__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)\s*)*"
    names = re.findall(r'extern\s*"C"\s*' + attr + r'(?:static\s+)?EMU_GLOBAL_MARK\s+' + attr + r'void\s+' + attr + r'(\w+)\s*\(', text)
    names = list(dict.fromkeys(names))
    if not names:
        raise RuntimeError(f'{path}: no extern "C" __global__ void kernel found')
    key = hashlib.sha256(repr((path, common, flags, names)).encode() + text.encode())
    sources = [path, *sorted(glob.glob(HERE + "/*.h"))]
    for d in {os.path.dirname(path), KERNELS, *include}:
        sources += sorted(glob.glob(d + "/*.cuh") + glob.glob(d + "/*.h"))
    for s in sources:
        key.update(open(s, "rb").read())
    stem = os.path.join(CACHE, os.path.basename(path).split(".")[0] + "-" + key.hexdigest()[:20])
    so = stem + ".so"
    if not os.path.exists(so):
        cpp = f"{stem}.{os.getpid()}.cpp"
        with open(cpp, "w") as f:
            f.write(f'#include "emulate.h"\n#include "{path}"\n')
            for n in names:
                f.write(f'extern "C" __attribute__((visibility("default"))) void launch_{n}(unsigned gx, unsigned gy, unsigned gz, unsigned bx, '
                        f'unsigned by, unsigned bz, size_t smem, void** args) {{ emu::run("{n}", {n}, dim3(gx, gy, gz), dim3(bx, by, bz), smem, args); }}\n'
                        f'extern "C" __attribute__((visibility("default"))) int describe_{n}(int* out) {{ return emu::describe({n}, out); }}\n')
        tmp = f"{stem}.{os.getpid()}.tmp.so"
        r = subprocess.run(["g++", *flags, *common, "-o", tmp, cpp, "-ldl"], capture_output=True, text=True)
        if r.returncode:
            raise RuntimeError(f"compiling {path}:\n{r.stderr[:12000]}")
        if r.stderr.strip():
            print(r.stderr[:4000], file=sys.stderr)
        os.replace(tmp, so)
    return Module(path, so, names)


class Module:
    def __init__(self, path, so, names):
        self.path, self.so, self.kernels = path, so, names
        self.lib = ctypes.CDLL(so, mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self.sig = {}
        for n in names:
            out = (ctypes.c_int * 256)()
            c = getattr(self.lib, "describe_" + n)(out)
            self.sig[n] = [(v >> 2, "?pfi"[v & 3]) for v in out[:c]]
        # static shared memory, by function that declares it
        by = {}
        for line in subprocess.run(["nm", "-C", "-S", so], capture_output=True, text=True).stdout.splitlines():
            m = re.match(r"[0-9a-f]+ ([0-9a-f]+) [bBdD] (.*)::(\w+)$", line)
            if m and m.group(2).split("(")[0] in names:
                by[m.group(2)] = by.get(m.group(2), 0) + int(m.group(1), 16)
        self.static_shared = by
        for k, v in by.items():
            if v > 48 * 1024:
                warn(f"{k.split('(')[0]} has {v} bytes of static shared memory (> 48 KiB)")

    def launch(self, name, grid, block, args, smem=0, seed=None):
        if name not in self.sig:
            raise KeyError(f"no kernel {name}; there are {self.kernels}")
        three = lambda v: tuple(int(x) for x in (v if isinstance(v, (tuple, list)) else (v,))) + (1,) * (2 - (len(v) - 1 if isinstance(v, (tuple, list)) else 0))
        grid, block = three(grid), three(block)
        if any(g <= 0 for g in grid + block):
            raise ValueError(f"{name}: grid {grid}, block {block}")
        if grid[0] > 2**31 - 1 or grid[1] > 65535 or grid[2] > 65535:
            warn(f"{name}: grid {grid} is too large for a GPU")
        if block[0] * block[1] * block[2] > 1024 or block[2] > 64:
            raise ValueError(f"{name}: block {block} has more than 1024 threads")
        static = sum(v for k, v in self.static_shared.items() if k.split("(")[0] == name)
        if smem + static > 227 * 1024:
            warn(f"{name}: {smem} + {static} (static) bytes of shared memory > 227 KiB")
        sig = self.sig[name]
        if len(sig) != len(args):
            raise TypeError(f"{name} takes {len(sig)} arguments, {len(args)} given")
        keep, owners, ptrs = [], {}, (ctypes.c_void_p * max(1, len(args)))()
        for i, (a, (size, kind)) in enumerate(zip(args, sig)):
            def bad(what):
                raise TypeError(f"{name}, argument {i}: {what} given for a parameter of {size} bytes ({dict(p='pointer', f='float', i='integer').get(kind, 'struct')})")
            if a is None or isinstance(a, np.ndarray) and kind == "p":
                if kind != "p":
                    bad(f"{a!r:.60}")
                v = np.array([0 if a is None else self._guard(a, i, owners)], np.uint64)
            else:
                if isinstance(a, Map):
                    a = a.pack(self._guard(a.array, i, owners))
                if isinstance(a, np.ndarray) and a.dtype.kind == "V" or isinstance(a, (ctypes.Structure, bytes, np.void)):
                    a = bytes(a) if not isinstance(a, np.ndarray) else a.tobytes()
                    v = np.empty(len(a) + 64, np.uint8)
                    v = v[-v.ctypes.data % 64:][:len(a)]  # as aligned as a struct may ask for
                    v[:] = np.frombuffer(a, np.uint8)
                    if v.size != size:
                        bad(f"a struct of {v.size} bytes")
                else:
                    if isinstance(a, (bool, np.bool_)):
                        v = np.array([a], np.uint8 if size == 1 else np.int32)
                    elif isinstance(a, int):
                        v = np.array([a], np.int32)
                    elif isinstance(a, float):
                        v = np.array([a], np.float64 if size == 8 and isinstance(a, np.float64) else np.float32)
                    elif isinstance(a, np.generic):
                        v = np.array([a])
                    else:
                        bad(type(a).__name__)
                    if v.itemsize != size or (kind == "f") != (v.dtype.kind == "f") and kind in "fi":
                        bad(f"{type(a).__name__} -> {v.dtype}")
            keep.append(v)
            ptrs[i] = v.ctypes.data
        t = time.time()
        old = os.environ.get("EMU_SEED")
        if seed is not None:
            os.environ["EMU_SEED"] = str(seed)
        sys.stdout.flush(); sys.stderr.flush()
        f = getattr(self.lib, "launch_" + name)
        f.restype = None
        f(*[ctypes.c_uint(x) for x in grid + block], ctypes.c_size_t(smem), ptrs)
        if seed is not None:
            if old is None: del os.environ["EMU_SEED"]
            else: os.environ["EMU_SEED"] = old
        if os.environ.get("EMU_VERBOSE"):
            print(f"emu: {name} grid {grid} block {block} smem {smem}: {time.time() - t:.3f} s", file=sys.stderr)
        self._back(name, owners)

    @staticmethod
    def _guard(a, i, owners):
        base = a
        while isinstance(base.base, np.ndarray):
            base = base.base
        if base.size == 0:
            base_bytes = np.empty(0, np.uint8)
        else:
            flat = base if base.flags.c_contiguous else base.T
            if not flat.flags.c_contiguous:
                raise TypeError(f"argument {i}: the array's memory is not contiguous")
            base_bytes = flat.reshape(-1).view(np.uint8)
        start = base.__array_interface__["data"][0]
        if start not in owners:
            raw = np.empty(base_bytes.size + 2 * GUARD + 256, np.uint8)
            off = -raw.ctypes.data % 256
            raw = raw[off:off + base_bytes.size + 2 * GUARD]
            raw[:GUARD] = PATTERN
            raw[GUARD:GUARD + base_bytes.size] = base_bytes
            raw[GUARD + base_bytes.size:] = PATTERN
            owners[start] = (raw, base_bytes, i, base.flags.writeable)
        raw = owners[start][0]
        return raw.ctypes.data + GUARD + (a.__array_interface__["data"][0] - start)

    @staticmethod
    def _back(name, owners):
        errors = []
        for raw, base_bytes, i, writeable in owners.values():
            n = base_bytes.size
            for part, where, shift in ((raw[:GUARD], "before", -GUARD), (raw[GUARD + n:], "past the end of", 0)):
                d = np.nonzero(part != PATTERN)[0]
                if d.size:
                    errors.append(f"argument {i}: {d.size} bytes written {where} the array, first at byte {shift + int(d[0]) + (n if shift == 0 else 0)} of {n}")
            inner = raw[GUARD:GUARD + n]
            if writeable:
                base_bytes[...] = inner
            elif not np.array_equal(inner, base_bytes):
                errors.append(f"argument {i}: a read-only array was written")
        if errors:
            raise RuntimeError(f"{name}: out of bounds: " + "; ".join(errors))
