"""Makes the golden files of this folder with the libraries of the Python world.

    pip install numpy h5py tables soundfile librosa safetensors
    python make.py

word.wav            0.6 s of a made-up word, PCM 16 bit, 16 kHz                     (soundfile)
mfcc.safetensors    its coefficients, [101, 13], padded with silence to one second  (librosa)
spikes_tables.h5    eight recordings of spikes, laid out as shd_train.h5 is         (PyTables)
spikes_h5py.h5      the same                                                        (h5py)
bins.safetensors    their spikes counted: recording, step, channel, count           (numpy)
vectors.safetensors what `task.encoding: vectors` reads: 6 symbols                  (safetensors)
"""

import h5py
import librosa
import numpy as np
import soundfile
import tables
from safetensors.numpy import save_file

RATE = 16_000
rng = np.random.default_rng(7)

# ---- a word: a gliding voice with three formants, then a hiss

t = np.arange(int(0.6 * RATE)) / RATE
glide = 2 * np.pi * (110 * t + 60 * t**2)
voice = sum(np.sin(k * glide) * np.exp(-(((k * 120 - f) / 300) ** 2)) for k in range(1, 40) for f in (500, 1500, 2500))
word = np.where(t < 0.4, 0.15 * voice * np.hanning(len(t)), 0.0)
word += np.where(t >= 0.35, 0.02 * rng.standard_normal(len(t)), 0.0)
soundfile.write("word.wav", word, RATE, subtype="PCM_16")

samples, rate = soundfile.read("word.wav", dtype="float64")
assert rate == RATE
samples = np.pad(samples, (0, RATE - len(samples)))
power = librosa.feature.melspectrogram(
    y=samples, sr=RATE, n_fft=512, win_length=400, hop_length=160, window="hann", center=True, pad_mode="reflect",
    power=2.0, n_mels=40, fmin=0.0, fmax=RATE / 2, htk=True, norm=None)
decibels = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=80.0)
mfcc = librosa.feature.mfcc(S=decibels, n_mfcc=13, dct_type=2, norm="ortho")
save_file({"mfcc": np.ascontiguousarray(mfcc.T.astype(np.float32))}, "mfcc.safetensors")

# ---- spikes: recordings of two symbols, one spike at each edge of the first steps, some at and behind the end

EDGES = np.linspace(0, 1.4, 140)
labels = np.array([0, 1, 0, 1, 0, 1, 1, 0], dtype=np.uint16)
recordings = []
for i, label in enumerate(labels):
    count = 40 + 10 * i
    times = rng.uniform(0, [0.7, 1.1][label], count)
    times = np.concatenate([times, times[:5], [0.0, EDGES[3], 1.39, 1.4, 1.45]]).astype(np.float16)
    units = rng.integers(0, 700, count)
    units = np.concatenate([units, units[:5], [0, 699, 350, 1, 2]]).astype(np.uint16)
    order = np.argsort(times, kind="stable")
    recordings.append((times[order], units[order]))

with tables.open_file("spikes_tables.h5", "w") as file:
    spikes = file.create_group("/", "spikes")
    times = file.create_vlarray(spikes, "times", tables.Float16Atom(), chunkshape=3)
    units = file.create_vlarray(spikes, "units", tables.UInt16Atom(), chunkshape=3)
    for t, u in recordings:
        times.append(t)
        units.append(u)
    file.create_array("/", "labels", labels)
    file.create_array(file.create_group("/", "extra"), "speaker", np.zeros(len(labels), np.uint16))

with h5py.File("spikes_h5py.h5", "w") as file:
    for name, dtype, part in [("times", np.float16, 0), ("units", np.uint16, 1)]:
        rows = file.create_dataset(f"spikes/{name}", (len(labels),), h5py.vlen_dtype(dtype))
        for i, recording in enumerate(recordings):
            rows[i] = recording[part]
    file["labels"] = labels.astype(np.int64)

counts = np.zeros((len(labels), 140, 700), np.int64)
for i, (t, u) in enumerate(recordings):
    steps = np.digitize(t, EDGES)
    inside = steps < 140
    np.add.at(counts[i], (steps[inside], u[inside]), 1)
where = np.argwhere(counts)
bins = np.concatenate([where, counts[tuple(where.T)][:, None]], axis=1)
save_file({"bins": np.ascontiguousarray(bins, np.int32)}, "bins.safetensors")

# ---- vectors: 6 symbols, 3 recordings of 2 frames and 4 channels to train on, 2 to test on

save_file(
    {
        "train": rng.standard_normal((6, 3, 2, 4)).astype(np.float32),
        "validation": rng.standard_normal((6, 1, 2, 4)).astype(np.float32),
        "test": rng.standard_normal((6, 2, 2, 4)).astype(np.float32),
    },
    "vectors.safetensors",
)
