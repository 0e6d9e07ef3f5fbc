#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tests and the benchmark of microgpt.

    python test_microgpt.py              run all tests
    python test_microgpt.py benchmark    print what things cost on this machine
    python test_microgpt.py readme       run everything that the README shows, as it stands there

Gradients are held against finite differences, each Tensor operation against its spelling in Values, the
command line is run as a process. Two things from outside the repository are used if they lie in ../shared: the
reference's names, for the run that must come out the same, and the yardstick, which costs what the reference costs.
"""

import cmath
import contextlib
import errno
import gc
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import xml.etree.ElementTree as ElementTree
from array import array
from collections import Counter
from functools import partial
from itertools import chain, repeat
from operator import mul

import microgpt
import vulkan_gemm
from microgpt import CharTokenizer, Config, Scalar, Tensor, UserError, Value

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "microgpt.py")
NAMES = os.path.join(HERE, "..", "shared", "names.txt")
YARDSTICK = os.path.join(HERE, "..", "shared", "yardstick", "reference_cost.py")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it, and so would all runs
needs_names = unittest.skipUnless(os.path.exists(NAMES), "needs the reference's names in ../shared/names.txt")


def normal(rng, rows, columns):
    """A matrix of normally distributed numbers."""
    return [[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]


def train(engine, config, weights, batch_at, steps, total=None, lr=0.01, **settings):
    """Train by Adam with linear decay, as the default run does, and return the losses."""
    total = total or steps
    m, v = microgpt.zeros(weights), microgpt.zeros(weights)
    rate_at = lambda step: lr * (1 - step / total)
    compute = settings.pop("compute", None) or partial(microgpt.loss_and_grads, engine, config)
    training = microgpt.train(compute, weights, m, v, batch_at, steps, rate_at, **settings)
    return [loss for _, loss, _, _ in training]


def flat(rows):
    """All numbers of a matrix, or of a dictionary of matrices, in one list."""
    rows = [row for matrix in rows.values() for row in matrix] if isinstance(rows, dict) else rows
    return [a for row in rows for a in row]


class Test(unittest.TestCase):
    """A TestCase that compares matrices, and leaves no tape behind."""

    def tearDown(self):
        self.assertEqual(microgpt.tape, [])

    def assertClose(self, got, wanted, tolerance=1e-9):
        """Every number within a tolerance relative to the largest of them."""
        got, wanted = flat(got), flat(wanted)
        self.assertEqual(len(got), len(wanted))
        scale = max([1e-3, *map(abs, wanted)])
        for i, (a, b) in enumerate(zip(got, wanted)):
            self.assertLessEqual(abs(a - b), tolerance * scale, f"number {i}: {a} is not {b}")


# 1. Dataset -----------------------------------------------------------------------------------------------


class Files(Test):
    timeout = 120  # seconds that a process may take

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def file(self, name, content):
        path = os.path.join(self.folder.name, name)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return path

    def run_script(self, *flags, env=None, script=SCRIPT):
        """Run microgpt.py as a process in the test's folder; its output as text, carriage returns kept."""
        done = subprocess.run(
            [sys.executable, script, *flags],
            cwd=self.folder.name,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=self.timeout,
        )
        done.stdout = done.stdout.decode().replace(os.linesep, "\n")
        done.stderr = done.stderr.decode().replace(os.linesep, "\n")
        return done

    def assertRefused(self, status, pattern, *flags):
        """The run ends with this status and one line that matches."""
        done = self.run_script(*flags)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (status, 1), done.stderr)
        self.assertRegex(done.stderr, r"^microgpt: error: .*(" + pattern + ")")
        return done


class TestDataset(Files):
    def test_documents_are_the_stripped_lines_without_blank_ones(self):
        path = self.file("a.txt", "anna\n\n  bob \n\t\nclara")
        self.assertEqual(microgpt.read_documents([path]), ["anna", "bob", "clara"])

    def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_the_text(self):
        path = self.file("a.txt", b"\xef\xbb\xbfanna\r\nbob\r\n")
        self.assertEqual(microgpt.read_documents([path]), ["anna", "bob"])
        self.assertEqual(microgpt.read_documents([path], stream=True), ["anna\nbob\n"])

    def test_only_line_ends_part_documents(self):
        path = self.file("a.txt", "a\x0bb\u2028c\x85d\ne")
        self.assertEqual(microgpt.read_documents([path]), ["a\x0bb\u2028c\x85d", "e"])

    def test_a_stream_joins_the_files_as_they_are(self):
        paths = [self.file("a.txt", "one\n\ntwo "), self.file("b.txt", " three\n")]
        self.assertEqual(microgpt.read_documents(paths, stream=True), ["one\n\ntwo  three\n"])

    def test_globs_are_merged_sorted_and_each_file_is_read_once(self):
        for name in ("b.txt", "a.txt", "c.md", "odd[1].txt"):
            self.file(name, "x")
        at = lambda name: os.path.join(self.folder.name, name)
        self.assertEqual(
            microgpt.find_corpus([at("*.txt"), at("a.*"), at("odd[1].txt")]),
            [at("a.txt"), at("b.txt"), at("odd[1].txt")],
        )

    def test_batches_go_through_the_documents_and_around(self):
        batch = microgpt.document_batches(["ab", "c", "defg"], list, "|", 3, 2)
        self.assertEqual(batch(0), [["|", "a", "b", "|"], ["|", "c", "|"]])
        self.assertEqual(batch(1), [["|", "d", "e", "f"], ["|", "a", "b", "|"]])
        self.assertEqual(batch(2), [["|", "c", "|"], ["|", "d", "e", "f"]])

    def test_windows_of_a_stream_come_from_all_of_it(self):
        text = "abcdefgh"
        batch = microgpt.stream_batches(text, list, 3, 5, 1)
        seen = {"".join(window) for step in range(50) for window in batch(step)}
        self.assertEqual(seen, {text[i : i + 4] for i in range(5)})
        with self.assertRaises(UserError):
            microgpt.stream_batches("abc", list, 3, 1, 1)

    def test_input_txt_holds_names(self):
        path = os.path.join(HERE, "input.txt")
        docs = microgpt.read_documents([path])
        self.assertGreaterEqual(len(docs), 5000)
        self.assertEqual(len(set(docs)), len(docs))
        for name in docs:
            self.assertRegex(name, "^[a-z]{2,15}$")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), "".join(name + "\n" for name in docs).encode())

    def test_windows_of_a_stream_depend_on_the_seed_and_the_step_alone(self):
        one, same, other = (microgpt.stream_batches(range(10**6), list, 3, 2, seed) for seed in (1, 1, 2))
        one(3)
        self.assertEqual(one(7), same(7))
        self.assertNotEqual(one(7), one(8))
        self.assertNotEqual(one(7), other(7))


# 2. Characters --------------------------------------------------------------------------------------------


class TestCharTokenizer(Test):
    def test_ids_are_the_sorted_characters_then_bos(self):
        tokenizer = CharTokenizer(["cab", "bad"])
        self.assertEqual((tokenizer.encode("abcd"), tokenizer.bos, tokenizer.vocab_size), ([0, 1, 2, 3], 4, 5))

    def test_any_text_comes_back(self):
        for text in ("", "anna", "e\u0301e\u0301", "👩‍👩‍👧 🇫🇷", "שלום עולם", "a\nb\tc \0", "\U0010ffff"):
            tokenizer = CharTokenizer([text, "x"])
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

    def test_bos_has_no_text(self):
        tokenizer = CharTokenizer(["ab"])
        self.assertEqual(tokenizer.decode([tokenizer.bos, 0, 1, tokenizer.bos]), "ab")

    def test_an_unknown_character_is_named(self):
        with self.assertRaisesRegex(UserError, "'é'"):
            CharTokenizer(["cafe"]).encode("café")


# 3. Autograd on one number --------------------------------------------------------------------------------


class TestValue(Test):
    operations = {
        "a + b": lambda a, b: a + b,
        "a - b": lambda a, b: a - b,
        "a * b": lambda a, b: a * b,
        "a / b": lambda a, b: a / b,
        "-a": lambda a, b: -a,
        "a + 2": lambda a, b: a + 2,
        "2 + a": lambda a, b: 2 + a,
        "a - 2": lambda a, b: a - 2,
        "2 - a": lambda a, b: 2 - a,
        "a * 3": lambda a, b: a * 3,
        "3 * a": lambda a, b: 3 * a,
        "a / 3": lambda a, b: a / 3,
        "3 / a": lambda a, b: 3 / a,
        "a ** 3": lambda a, b: a**3,
        "a ** -0.5": lambda a, b: a**-0.5,
        "exp": lambda a, b: a.exp() if isinstance(a, Value) else cmath.exp(a),
        "log": lambda a, b: a.log() if isinstance(a, Value) else cmath.log(a),
        "tanh": lambda a, b: a.tanh() if isinstance(a, Value) else cmath.tanh(a),
        "relu": lambda a, b: a.relu() if isinstance(a, Value) else (a if a.real > 0 else 0.0),
        "relu of a negative": lambda a, b: (-a).relu() if isinstance(a, Value) else 0.0,
        "a with itself": lambda a, b: a * a + a / a - a,
        "all ways add up": lambda a, b: (a * b + a) * (a - b) / (a * a + 1),
    }

    def test_every_operator_against_finite_differences(self):
        rng, h = random.Random(1), 1e-6
        for name, f in self.operations.items():
            for _ in range(5):
                x, y = rng.uniform(0.3, 2), rng.uniform(0.3, 2)
                a, b = Value(x), Value(y)
                out = f(a, b)
                with self.subTest(name, a=x, b=y):
                    self.assertAlmostEqual(out.data, complex(f(x, y)).real, 12)
                    microgpt.backward(out)
                    da = (complex(f(x + h, y)) - complex(f(x - h, y))).real / (2 * h)
                    db = (complex(f(x, y + h)) - complex(f(x, y - h))).real / (2 * h)
                    self.assertAlmostEqual(a.grad, da, 6)
                    self.assertAlmostEqual(b.grad, db, 6)

    def test_a_plain_number_makes_no_node(self):
        a = Value(2.0)
        for f in (lambda: a + 1, lambda: 1 - a, lambda: a * 2, lambda: 2 / a, lambda: a**2, lambda: -a):
            f()
            self.assertEqual(len(microgpt.tape), 1)
            microgpt.tape.clear()

    def test_a_graph_of_a_million_operations_deep(self):
        a = Value(1.0)
        x = a
        for _ in range(500_000):
            x = x * 1.000001 + 0.0
        microgpt.backward(x)
        self.assertAlmostEqual(a.grad, 1.000001**500_000, 6)

    def test_without_recording_nothing_is_kept(self):
        a = Value(3.0)
        with microgpt.no_grad():
            out = (a * 2 + 1).exp()
            with microgpt.no_grad():
                pass
            self.assertFalse(microgpt.recording)
        self.assertTrue(microgpt.recording)
        self.assertEqual(out.data, math.exp(7))
        self.assertFalse(hasattr(out, "a"))

    def test_recording_comes_back_after_an_error(self):
        with self.assertRaises(ZeroDivisionError), microgpt.no_grad():
            1 / Value(0.0)
        self.assertTrue(microgpt.recording)


# 4 and 9. The operations, in Values and a matrix at a time -------------------------------------------------


def evaluate(engine, f, inputs):
    """Wrap matrices, apply f to them. Returns the wrapped ones, the result, and its numbers as rows."""
    w = engine.wrap(dict(enumerate(inputs)))
    out = f(engine, *w.values())
    is_loss = not isinstance(out, list) and isinstance(out.data, float)
    return w, out, [[out.data]] if is_loss else engine.floats(out)


def loss_weights(rows):
    """A weight for each number in a result, so that their weighted sum can stand in for a loss."""
    return normal(random.Random(1), len(rows), len(rows[0]))


def gradients(engine, f, inputs):
    """The numbers of f's result, and the gradients of its inputs by their weighted sum."""
    w, out, rows = evaluate(engine, f, inputs)
    weights = loss_weights(rows)
    if engine is Scalar:
        values = flat(out) if isinstance(out, list) else [out]
        microgpt.backward(sum(a * b for a, b in zip(values, flat(weights))))
    else:
        grad = weights[0][0] if isinstance(out.data, float) else weights
        microgpt.backward(Tensor(0.0, lambda g: out.receive(grad)))
    return rows, list(engine.grads(w).values())


def matrix_operations(rng):
    """Name -> (operation, its inputs) on random shapes."""
    t, d, e = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    x, z = normal(rng, t, d), normal(rng, t, d)
    w, bias, row = normal(rng, e, d), normal(rng, 1, e), normal(rng, 1, d)
    ids = [rng.randrange(e) for _ in range(t)]
    targets = [rng.randrange(d) for _ in range(t)]
    n_head, size = rng.randint(1, 3), rng.randint(1, 4)
    lengths = [rng.randint(1, 5) for _ in range(rng.randint(1, 3))]
    qkv = [normal(rng, sum(lengths), n_head * size) for _ in range(3)]

    def attention(engine, q, k, v):
        return engine.attention(q, k, v, lengths, [([], []) for _ in lengths], n_head)

    def mlp(engine, x, fc1, fc2):
        return engine.linear(engine.relu(engine.linear(x, fc1)), fc2)

    def relu_twice(engine, x, fc1, fc2):
        h = engine.relu(engine.linear(x, fc1))
        return engine.add(engine.linear(h, fc2), engine.rmsnorm(engine.linear(engine.relu(h), fc2)))

    return {
        "embed": (lambda engine, table: engine.embed(table, ids), [w]),
        "add": (lambda engine, x, z: engine.add(x, z), [x, z]),
        "add to itself": (lambda engine, x: engine.add(x, x), [x]),
        "linear": (lambda engine, x, w: engine.linear(x, w), [x, w]),
        "linear with bias": (lambda engine, x, w, bias: engine.linear(x, w, bias), [x, w, bias]),
        "rmsnorm": (lambda engine, x: engine.rmsnorm(x), [x]),
        "layernorm": (lambda engine, x, gain, bias: engine.layernorm(x, gain, bias), [x, row, normal(rng, 1, d)]),
        "relu": (lambda engine, x: engine.relu(x), [x]),
        "gelu": (lambda engine, x: engine.gelu(x), [x]),
        "attention": (attention, qkv),
        "cross entropy": (lambda engine, x: engine.cross_entropy(x, targets), [x]),
        "linear, relu, linear": (mlp, [x, w, normal(rng, 3, e)]),
        "relu of a relu": (relu_twice, [x, w, normal(rng, 3, e)]),
        "relu with bias behind": (
            lambda engine, x, w, b: engine.relu(engine.linear(engine.relu(x), w, b)),
            [x, w, bias],
        ),
    }


class TestOperations(Test):
    def test_every_tensor_operation_against_its_spelling_in_values(self):
        for seed in range(25):
            for name, (f, inputs) in matrix_operations(random.Random(seed)).items():
                with self.subTest(name, seed=seed):
                    wanted, wanted_grads = gradients(Scalar, f, inputs)
                    got, grads = gradients(Tensor, f, inputs)
                    self.assertClose(got, wanted)
                    for a, b in zip(grads, wanted_grads):
                        self.assertClose(a, b)

    def test_every_operation_of_both_engines_against_finite_differences(self):
        for engine in (Scalar, Tensor):
            for seed in range(3):
                for name, (f, inputs) in matrix_operations(random.Random(100 + seed)).items():
                    _, grads = gradients(engine, f, inputs)
                    rng = random.Random(seed)
                    for matrix, grad in zip(inputs, grads):
                        i, j = rng.randrange(len(matrix)), rng.randrange(len(matrix[0]))
                        with self.subTest(name, engine=engine.__name__, seed=seed, at=(i, j)):
                            slope = self.slope(engine, f, inputs, matrix[i], j)
                            self.assertAlmostEqual(grad[i][j], slope, delta=1e-5 * max(1, abs(slope)))

    def slope(self, engine, f, inputs, row, j, h=1e-6):
        """The derivative of the weighted sum of f's result by one number of its inputs."""
        sums, before = [], row[j]
        for row[j] in (before + h, before - h):
            with microgpt.no_grad():
                _, _, rows = evaluate(engine, f, inputs)
            sums.append(sum(map(mul, flat(rows), flat(loss_weights(rows)))))
        row[j] = before
        return (sums[0] - sums[1]) / (2 * h)

    def test_matmul_against_its_definition(self):
        for seed in range(40):
            rng = random.Random(seed)
            m, n, k = (rng.choice([1, 2, 3, 7, 16, 17, 40]) for _ in range(3))
            a, b = normal(rng, m, k), normal(rng, k, n)
            wanted = [[sum(a[i][x] * b[x][j] for x in range(k)) for j in range(n)] for i in range(m)]
            at, bt = microgpt.transpose(a), microgpt.transpose(b)
            with self.subTest(m=m, n=n, k=k):
                self.assertClose(microgpt.matmul(a, b), wanted)
                self.assertClose(microgpt.matmul(at, b, transpose_a=True), wanted)
                self.assertClose(microgpt.matmul(a, bt, transpose_b=True), wanted)
                self.assertClose(microgpt.matmul(at, bt, True, True), wanted)

    def test_sparse_rows_give_the_products_of_dense_ones(self):
        def dense(rows):
            return [list(row) for row in rows]

        for seed in range(40):
            rng = random.Random(seed)
            m, n, k = (rng.randint(1, 12) for _ in range(3))

            def sparse(rows, columns):
                index = [sorted(rng.sample(range(columns), rng.randint(0, columns))) for _ in range(rows)]
                return [microgpt.SparseRow(columns, at, [rng.gauss(0, 1) for _ in at]) for at in index]

            a, b, g, where = sparse(m, k), normal(rng, k, n), normal(rng, m, n), sparse(m, n)
            matmul = microgpt.matmul
            with self.subTest(seed=seed):
                self.assertClose(matmul(a, b), matmul(dense(a), b))
                self.assertClose(matmul(a, microgpt.transpose(b), transpose_b=True), matmul(dense(a), b))
                self.assertClose(matmul(a, g, transpose_a=True), matmul(dense(a), g, transpose_a=True))
                self.assertClose(matmul(g, a, transpose_a=True), matmul(g, dense(a), transpose_a=True))
                self.assertClose(
                    matmul(a, where, transpose_a=True), matmul(dense(a), dense(where), transpose_a=True)
                )
                masked = [[x * bool(y) for x, y in zip(*rows)] for rows in zip(matmul(dense(a), b), where)]
                self.assertClose(matmul(dense(a), b, where=where), masked)

    def test_a_tensor_used_twice_gets_both_gradients_and_shares_no_rows(self):
        x = [[1.0, -2.0], [3.0, 4.0]]
        f = lambda engine, x: engine.add(engine.add(x, x), engine.rmsnorm(x))
        (_, wanted), (_, got) = gradients(Scalar, f, [x]), gradients(Tensor, f, [x])
        self.assertClose(got[0], wanted[0])

    def test_cross_entropy_survives_large_logits(self):
        for engine in (Scalar, Tensor):
            for logits, loss in (([1e4, -1e4, 0.0], 0.0), ([-1e4, 1e4, 0.0], 2e4), ([1e4, 1e4, 1e4], math.log(3))):
                w = engine.wrap({"x": [logits]})
                out = engine.cross_entropy(w["x"], [0])
                self.assertAlmostEqual(out.data, loss, 9)
                microgpt.backward(out)
                self.assertTrue(all(map(math.isfinite, flat(engine.grads(w)))))

    def test_no_position_looks_ahead(self):
        rng = random.Random(3)
        q, k, v = (normal(rng, 5, 4) for _ in range(3))
        for engine in (Scalar, Tensor):
            before = engine.floats(engine.attention(*engine.wrap({0: q, 1: k, 2: v}).values(), [5], [([], [])], 2))
            k[3][0] += 1.0
            v[4][1] -= 1.0
            after = engine.floats(engine.attention(*engine.wrap({0: q, 1: k, 2: v}).values(), [5], [([], [])], 2))
            microgpt.tape.clear()
            self.assertEqual(before[:3], after[:3])
            self.assertNotEqual(before[3:], after[3:])

    def test_attention_in_several_blocks_against_its_spelling_in_values(self):
        rng, lengths = random.Random(5), [70, 3, 33]  # Tensor goes by blocks of 32
        qkv = [normal(rng, sum(lengths), 4) for _ in range(3)]
        f = lambda engine, q, k, v: engine.attention(q, k, v, lengths, [([], []) for _ in lengths], 2)
        (wanted, wanted_grads), (got, grads) = gradients(Scalar, f, qkv), gradients(Tensor, f, qkv)
        self.assertClose(got, wanted)
        for a, b in zip(grads, wanted_grads):
            self.assertClose(a, b)

    def test_relu_is_flat_at_0(self):
        for engine in (Scalar, Tensor):
            for zero in (0.0, -0.0):
                got, (grad,) = gradients(engine, lambda engine, x: engine.relu(x), [[[zero, 1.0]]])
                self.assertEqual((flat(got), grad[0][0]), ([0.0, 1.0], 0.0))

    def test_attention_survives_large_scores(self):
        for engine in (Scalar, Tensor):
            with microgpt.no_grad():
                q, v = engine.wrap({0: [[100.0], [100.0]], 1: [[1.0], [2.0]]}).values()
                out = engine.floats(engine.attention(q, q, v, [2], [([], [])], 1))
            self.assertClose(out, [[1.0], [1.5]])

    def test_the_gradient_behind_a_relu_is_sparse(self):
        w = Tensor.wrap({0: [[1.0, -1.0]], 1: [[2.0, 3.0]]})
        h = Tensor.relu(w[0])
        out = Tensor.linear(h, w[1])
        microgpt.backward(Tensor(0.0, lambda g: out.receive([[1.0]])))
        self.assertEqual((h.grad, type(h.grad[0])), ([[2.0, 0.0]], microgpt.SparseRow))


# 5. GPT ---------------------------------------------------------------------------------------------------


def model(arch="microgpt", n_layer=2, n_embd=8, n_head=2, block_size=8, vocab_size=11, seed=5):
    """A small model with weights that are not symmetric in anything, biases and gains among them."""
    config = Config(vocab_size, n_layer, n_embd, n_head, block_size, arch)
    rng = random.Random(seed)
    weights = microgpt.initial_weights(config, rng)
    return config, {name: [[a + rng.gauss(0, 0.3) for a in row] for row in rows] for name, rows in weights.items()}


def logits(engine, config, weights, *chunks):
    """The logits of one document that is handed over in chunks."""
    cache, out = microgpt.new_cache(config), []
    with microgpt.no_grad():
        w = engine.wrap(weights)
        for chunk in chunks:
            out += engine.floats(microgpt.gpt(engine, config, w, [chunk], [cache]))
    return out


class TestGPT(Test):
    def test_config_refuses_what_cannot_be(self):
        for wrong in (
            {"n_head": 3},
            {"n_layer": 0},
            {"n_embd": -4},
            {"block_size": 0},
            {"vocab_size": 0},
            {"n_head": 0},
            {"arch": "gpt5"},
        ):
            with self.assertRaises(UserError, msg=wrong):
                Config(**{"vocab_size": 5, **wrong})

    def test_weights_are_drawn_in_the_order_of_the_reference(self):
        rng = random.Random(42)
        drawn = [rng.gauss(0, 0.08) for _ in range(5 * 4 + 3 * 4 + 5 * 4 + 4 * 4)]
        weights = microgpt.initial_weights(Config(5, 1, 4, 2, 3), random.Random(42))
        layer = ["layer0." + name for name in "attn_wq attn_wk attn_wv attn_wo mlp_fc1 mlp_fc2".split()]
        self.assertEqual(list(weights), ["wte", "wpe", "lm_head", *layer])
        self.assertEqual(flat(weights)[: len(drawn)], drawn)
        self.assertEqual([len(weights["layer0.mlp_fc1"]), len(weights["layer0.mlp_fc2"])], [16, 4])

    def test_gpt2_has_a_bias_on_every_linear_layer_and_a_gain_and_bias_on_every_norm(self):
        lean = microgpt.shapes(Config(5, 2, 4, 2, 3))
        full = microgpt.shapes(Config(5, 2, 4, 2, 3, "gpt2"))
        self.assertEqual(list(full)[: len(lean)], list(lean))
        linears = [name for name in lean if name not in ("wte", "wpe")]
        norms = [f"layer{i}.ln{j}" for i in range(2) for j in (1, 2)] + ["ln_f"]
        self.assertEqual(set(full) - set(lean), {n + ".bias" for n in linears + norms} | set(norms))
        for name in linears:
            self.assertEqual(full[name + ".bias"], (1, full[name][0]))

    def test_the_engines_agree_on_losses_and_on_every_gradient(self):
        docs = [[1, 2, 3, 4], [5, 6], [7, 1, 1, 2, 9, 10]]
        for arch in ("microgpt", "gpt2"):
            config, weights = model(arch)
            loss, wanted = microgpt.loss_and_grads(Scalar, config, weights, docs)
            got, grads = microgpt.loss_and_grads(Tensor, config, weights, docs)
            self.assertAlmostEqual(got, loss, 12)
            self.assertEqual(list(grads), list(weights))
            for name in weights:
                self.assertClose(grads[name], wanted[name])

    def test_the_engines_print_the_same_losses_for_20_steps(self):
        docs = ["emma", "olivia", "ava", "bo", "charlotte"]
        tokenizer = CharTokenizer(docs)
        for arch in ("microgpt", "gpt2"):
            losses = []
            for engine in (Scalar, Tensor):
                config = Config(tokenizer.vocab_size, 2, 8, 2, 8, arch)
                weights = microgpt.initial_weights(config, random.Random(1))
                batch = microgpt.document_batches(docs, tokenizer.encode, tokenizer.bos, 8, 3)
                losses.append([f"{loss:.4f}" for loss in train(engine, config, weights, batch, 20)])
            self.assertEqual(*losses)

    def test_gradients_of_the_whole_model_against_finite_differences(self):
        docs, h, rng = [[1, 2, 3, 4], [5, 6]], 1e-6, random.Random(2)
        for arch in ("microgpt", "gpt2"):
            config, weights = model(arch)
            _, grads = microgpt.loss_and_grads(Tensor, config, weights, docs)
            for name, rows in weights.items():
                i, j = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
                before, losses = rows[i][j], []
                for rows[i][j] in (before + h, before - h):
                    losses.append(microgpt.loss_and_grads(Tensor, config, weights, docs)[0])
                rows[i][j] = before
                self.assertAlmostEqual(grads[name][i][j], (losses[0] - losses[1]) / (2 * h), 7, (arch, name))

    def test_a_cache_gives_exactly_the_logits_of_one_pass(self):
        tokens = [1, 2, 3, 4, 5, 6, 7, 8]
        for engine in (Scalar, Tensor):
            for arch in ("microgpt", "gpt2"):
                config, weights = model(arch)
                whole = logits(engine, config, weights, tokens)
                self.assertEqual(logits(engine, config, weights, *[[token] for token in tokens]), whole)
                self.assertEqual(logits(engine, config, weights, tokens[:3], tokens[3:4], tokens[4:]), whole)

    def test_a_batch_gives_the_mean_of_its_documents(self):
        docs = [[1, 2, 3, 4], [5, 6], [7, 1, 1, 2, 9]]
        for engine in (Scalar, Tensor):
            config, weights = model()
            loss, grads = microgpt.loss_and_grads(engine, config, weights, docs)
            alone = [(microgpt.loss_and_grads(engine, config, weights, [doc]), len(doc) - 1) for doc in docs]
            total = sum(n for _, n in alone)
            self.assertAlmostEqual(loss, sum(one * n for (one, _), n in alone) / total, 12)
            for name in weights:
                parts = [[a * n / total for a in flat(g[name])] for (_, g), n in alone]
                self.assertClose([list(map(sum, zip(*parts)))], [flat(grads[name])], 1e-12)

    def test_a_step_leaves_nothing_on_the_tape_and_sampling_records_nothing(self):
        config, weights = model()
        for engine in (Scalar, Tensor):
            microgpt.loss_and_grads(engine, config, weights, [[1, 2, 3]])
            self.assertEqual(microgpt.tape, [])
            for _ in microgpt.sample(engine, config, weights, [1], 3):
                self.assertEqual(microgpt.tape, [])
                self.assertTrue(microgpt.recording)

    def test_gpt2_begins_with_gains_of_1_and_biases_of_0_and_the_matrices_of_microgpt(self):
        rngs = random.Random(42), random.Random(42)
        lean, full = (microgpt.initial_weights(Config(5, 2, 4, 2, 3, a), r) for a, r in zip(("microgpt", "gpt2"), rngs))
        self.assertEqual({name: full[name] for name in lean}, lean)
        self.assertEqual(*(rng.random() for rng in rngs))
        for name in full.keys() - lean.keys():
            self.assertEqual(set(flat(full[name])), {0.0 if name.endswith(".bias") else 1.0}, name)


# 6 and 7. Adam and training -------------------------------------------------------------------------------


class TestTraining(Test):
    def test_adam_against_the_formulas_of_the_paper(self):
        rng = random.Random(4)
        weights = {"w": normal(rng, 2, 3)}
        m, v = microgpt.zeros(weights), microgpt.zeros(weights)
        theta, m1, v1 = flat(weights), [0.0] * 6, [0.0] * 6
        for t in range(1, 4):
            grads = {"w": normal(rng, 2, 3)}
            microgpt.adam(weights, grads, m, v, t - 1, 0.1, 0.9, 0.95, 1e-3)
            for i, g in enumerate(flat(grads)):
                m1[i] = 0.9 * m1[i] + (1 - 0.9) * g
                v1[i] = 0.95 * v1[i] + (1 - 0.95) * g**2
                theta[i] -= 0.1 * (m1[i] / (1 - 0.9**t)) / (math.sqrt(v1[i] / (1 - 0.95**t)) + 1e-3)
            for got, wanted in ((weights, theta), (m, m1), (v, v1)):
                self.assertClose(got, [wanted], 1e-14)

    def test_training_lowers_the_loss_in_both_engines(self):
        docs = ["ab", "abab", "ababab"]
        tokenizer = CharTokenizer(docs)
        for engine in (Scalar, Tensor):
            config = Config(tokenizer.vocab_size, 1, 4, 1, 8)
            weights = microgpt.initial_weights(config, random.Random(1))
            batch = microgpt.document_batches(docs, tokenizer.encode, tokenizer.bos, 8, 1)
            losses = train(engine, config, weights, batch, 60, lr=0.05)
            self.assertLess(losses[-1], losses[0] / 2)

    def test_a_step_gets_its_batch_and_its_rate(self):
        seen = []
        optimizer = lambda weights, grads, m, v, step, lr, **settings: seen.append((step, lr, settings))
        config, weights = model()
        m, v, batches = {}, {}, {2: [[1, 2, 3]], 3: [[4, 5]]}
        compute = partial(microgpt.loss_and_grads, Tensor, config)
        steps = microgpt.train(compute, weights, m, v, batches.get, 4, {2: 0.5, 3: 0.25}.get, optimizer, 2, x=7)
        got = list(steps)
        self.assertEqual(seen, [(2, 0.5, {"x": 7}), (3, 0.25, {"x": 7})])
        self.assertEqual([(step, batch) for step, _, _, batch in got], list(batches.items()))


# 8. Sampling ----------------------------------------------------------------------------------------------


class TestSampling(Test):
    def test_temperature_0_takes_the_likeliest(self):
        self.assertEqual(microgpt.draw([0.0, 3.0, 2.9], 0, 0, None), 1)

    def test_tokens_come_as_often_as_softmax_says(self):
        rng, z, n = random.Random(6), [0.0, 1.0, -2.0, 0.5], 20000
        for temperature in (0.5, 1.0, 2.0):
            exps = [math.exp(a / temperature) for a in z]
            drawn = [microgpt.draw(z, temperature, 0, rng) for _ in range(n)]
            for i, e in enumerate(exps):
                p = e / sum(exps)
                self.assertLess(abs(drawn.count(i) / n - p), 5 * math.sqrt(p * (1 - p) / n))

    def test_top_k_leaves_the_k_likeliest(self):
        rng, z = random.Random(6), [0.0, 1.0, -2.0, 0.5]
        for k, left in (
            (1, {1}),
            (2, {1, 3}),
            (3, {0, 1, 3}),
            (4, {0, 1, 2, 3}),
            (9, {0, 1, 2, 3}),
            (0, {0, 1, 2, 3}),
        ):
            self.assertEqual({microgpt.draw(z, 3.0, k, rng) for _ in range(500)}, left)

    def test_tiny_temperatures_and_huge_logits_do_not_overflow(self):
        self.assertEqual(microgpt.draw([1e300, -1e300, 0.0], 1e-300, 0, random.Random(1)), 0)

    def test_a_model_without_numbers_is_refused(self):
        with self.assertRaises(UserError):
            microgpt.draw([math.nan, 1.0], 1.0, 0, random.Random(1))

    def test_past_the_context_the_window_slides(self):
        config, weights = model(block_size=6)
        got = list(microgpt.sample(Tensor, config, weights, [1, 2], 20, temperature=0))
        tokens, start = [1, 2], 0  # where the window begins
        for _ in range(20):
            if len(tokens) - start > 6:
                start = len(tokens) - 3
            row = logits(Tensor, config, weights, tokens[start:])[-1]
            tokens.append(row.index(max(row)))
        self.assertEqual(got, tokens[2:])

    def test_a_prompt_longer_than_the_context_keeps_its_end(self):
        config, weights = model(block_size=6)
        first = lambda prompt: next(microgpt.sample(Tensor, config, weights, prompt, 1, temperature=0))
        self.assertEqual(first([9, 8, 7, 6, 5, 4, 1, 2, 3]), first([1, 2, 3]))

    def test_a_context_of_one_works(self):
        config, weights = model(block_size=1)
        self.assertEqual(len(list(microgpt.sample(Tensor, config, weights, [1, 2], 5))), 5)

    def test_top_k_keeps_the_equals_of_the_last(self):
        rng = random.Random(6)
        self.assertEqual({microgpt.draw([1.0, 2.0, 1.0, 0.0], 3.0, 2, rng) for _ in range(500)}, {0, 1, 2})


# 10. Subwords ---------------------------------------------------------------------------------------------


def recount(docs, n, new):
    """The plain way to learn merges: count all pairs, merge the best, begin again."""
    merges = []
    while len(merges) < n:
        counts = Counter(pair for doc in docs for pair in zip(doc, doc[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merged, new = chr(new), new + 1
        merges.append(tuple(map(ord, best)))
        for i, doc in enumerate(docs):
            out, at = [], 0
            while at < len(doc):
                found = doc[at : at + 2] == best[0] + best[1]
                out.append(merged if found else doc[at])
                at += 1 + found
            docs[i] = "".join(out)
    return merges, docs


def characters(docs):
    """Documents as strings of chr(id), and the number of ids."""
    tokenizer = CharTokenizer(docs)
    return ["".join(map(chr, tokenizer.encode(doc))) for doc in docs], len(tokenizer.tokens)


class TestBPE(Test):
    def compare(self, docs, n):
        docs, new = characters(docs)
        self.assertEqual(microgpt.learn_merges(docs, n, new), recount(list(docs), n, new))

    def test_merges_are_those_of_a_recount_on_random_strings(self):
        for seed in range(190):
            rng = random.Random(seed)
            letters = "abcde"[: rng.randint(1, 5)]
            docs = ["".join(rng.choices(letters, k=rng.randint(0, 50))) for _ in range(rng.randint(1, 4))]
            with self.subTest(seed=seed, docs=docs):
                self.compare([*docs, "x"], rng.randint(0, 25))

    def test_merges_are_those_of_a_recount_on_runs_names_and_prose(self):
        names = microgpt.read_documents([os.path.join(HERE, "input.txt")])[:300]
        prose = microgpt.read_documents([os.path.join(HERE, "README.md")], stream=True)
        for n, docs in (
            (9, ["a" * 31]),
            (9, ["aaaabaaab", "aaa", "aabaa"]),
            (60, names),
            (80, [prose[0][:5000]]),
            (20, ["abab" * 9, "ba"]),
            (5, ["", "a", ""]),
            (0, ["abab"]),
            (9, ["é😀é😀", "😀é😀é"]),
        ):
            self.compare(docs, n)

    def test_no_merge_reaches_across_documents(self):
        docs, new = characters(["ab"] * 9 + ["cd"] * 8)
        merges, encoded = microgpt.learn_merges(docs, 9, new)
        self.assertEqual(merges, [(0, 1), (2, 3)])
        self.assertEqual(encoded, [chr(4)] * 9 + [chr(5)] * 8)

    def test_learning_returns_what_encoding_gives(self):
        docs = microgpt.read_documents([os.path.join(HERE, "input.txt")])[:500]
        strings, new = characters(docs)
        merges, encoded = microgpt.learn_merges(strings, 120, new)
        tokenizer = microgpt.BPETokenizer(docs, merges)
        self.assertEqual([list(map(ord, doc)) for doc in encoded], [tokenizer.encode(doc) for doc in docs])
        self.assertEqual((tokenizer.bos, tokenizer.vocab_size), (new + 120, new + 121))

    def test_any_text_of_known_characters_comes_back(self):
        docs = ["the cat and the hat 😀 שלום e\u0301\n\t" * 3]
        strings, new = characters(docs)
        tokenizer = microgpt.BPETokenizer(docs, microgpt.learn_merges(strings, 40, new)[0])
        rng = random.Random(8)
        for _ in range(50):
            text = "".join(rng.choices(docs[0], k=rng.randint(0, 60)))
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)
        with self.assertRaisesRegex(UserError, "'z'"):
            tokenizer.encode("the zebra")

    def test_learning_and_encoding_are_not_quadratic(self):
        rng = random.Random(1)
        words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 8))) for _ in range(500)]
        text = " ".join(rng.choices(words, k=60_000))
        start = time.perf_counter()
        strings, new = characters([text])
        merges, _ = microgpt.learn_merges(strings, 200, new)
        microgpt.BPETokenizer([text], merges).encode(text)
        self.assertLess(time.perf_counter() - start, 6)


# 11. The GPU ----------------------------------------------------------------------------------------------


def why_no_vulkan():
    """What keeps this machine from running Vulkan, or None."""
    try:
        vulkan_gemm.VulkanGemm().close()
    except vulkan_gemm.VulkanError as error:
        return f"needs Vulkan: {error}"


NO_VULKAN = why_no_vulkan()
LAYER = "VK_LAYER_KHRONOS_validation"
HAS_LAYER = any(
    os.path.exists(os.path.join(folder, "vulkan", "explicit_layer.d", LAYER + ".json"))
    or os.path.exists(os.path.join(folder, "vulkan", "explicit_layer.d", "VkLayer_khronos_validation.json"))
    for folder in ("/usr/share", "/usr/local/share", "/etc")
)
PRODUCTS = """
import random, sys, vulkan_gemm
with vulkan_gemm.VulkanGemm(force_staging=sys.argv[1] == "staging") as gpu:
    for n in (1, 5, 64, 100, 17):
        a = [[random.random() for _ in range(n)] for _ in range(n)]
        gpu.matmuls([a, a, a[:1]], [a, a, a], transpose_b=True)
"""


class TestShader(Test):
    def test_the_shipped_shader_is_that_of_gemm_comp(self):
        self.assertEqual(vulkan_gemm.source_hash(), vulkan_gemm.SHADER_SHA256)

    @unittest.skipUnless(shutil.which("spirv-val"), "needs spirv-val")
    def test_spirv_val_accepts_the_shipped_shader(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "gemm.spv")
            with open(path, "wb") as file:
                file.write(vulkan_gemm.load_shader())
            done = subprocess.run(["spirv-val", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_an_edited_shader_needs_a_compiler(self):
        with (
            unittest.mock.patch("vulkan_gemm.source_hash", lambda: "edited"),
            unittest.mock.patch("shutil.which", lambda name: None),
        ):
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "edited.*glslc"):
                vulkan_gemm.load_shader()

    def test_without_a_loader_one_error_says_so(self):
        def missing(*args):
            raise OSError("no such library")

        with unittest.mock.patch("ctypes.CDLL", missing):
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "^no Vulkan loader[^\n]*$"):
                vulkan_gemm.VulkanGemm()


@unittest.skipIf(NO_VULKAN, NO_VULKAN)
class TestVulkan(Files):
    def matrices(self, rng, shapes, transpose_a, transpose_b):
        a = [normal(rng, *((k, m) if transpose_a else (m, k))) for m, n, k in shapes]
        b = [normal(rng, *((n, k) if transpose_b else (k, n))) for m, n, k in shapes]
        return a, b

    def check(self, a, b, c, transpose_a, transpose_b, rng):
        """Some entries of c = op(a) op(b), each within 1e-5 sqrt(K) of the norms."""
        rows = microgpt.transpose(a) if transpose_a else a
        columns = b if transpose_b else microgpt.transpose(b)
        self.assertEqual((len(c), {len(row) for row in c}), (len(rows), {len(columns)}))
        for _ in range(60):
            i, j = rng.randrange(len(rows)), rng.randrange(len(columns))
            size = math.sqrt(math.fsum(x * x for x in rows[i]) * math.fsum(x * x for x in columns[j]))
            error = abs(c[i][j] - math.fsum(map(mul, rows[i], columns[j])))
            self.assertLessEqual(error, 1e-5 * math.sqrt(len(rows[i])) * size)

    def test_random_shapes_transposes_and_batches_against_plain_python(self):
        rng = random.Random(1)
        for staging in (False, True):
            with vulkan_gemm.VulkanGemm(force_staging=staging) as gpu:
                for _ in range(6):
                    top = rng.choice((9, 70, 300))
                    shapes = [
                        [rng.randint(1, top) for _ in range(3)] for _ in range(rng.randint(1, 3))
                    ] * rng.randint(1, 2)
                    for how in ((False, False), (True, False), (False, True), (True, True)):
                        a, b = self.matrices(rng, shapes, *how)
                        for buffer in gpu.buffers:  # what was there before must not matter
                            if buffer.view is not None:
                                buffer.view[:] = b"\xff" * len(buffer.view)
                        for x, y, c in zip(a, b, gpu.matmuls(a, b, *how)):
                            self.check(x, y, c, *how, rng)

    def test_nan_and_infinity_pass_through_and_stay_where_they_belong(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            (a, b), (c, d), (e, f) = gpu.matmul(
                [[1.0, math.inf], [math.nan, 0.0], [1.0, 1.0]], [[1.0, 2.0], [3.0, 0.0]]
            )
            self.assertEqual((a, e, f), (math.inf, 4.0, 2.0))
            self.assertTrue(all(map(math.isnan, (b, c, d))))

    def test_shapes_that_do_not_fit_are_refused(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            for a, b in (([], []), ([[1.0]], [[1.0], [2.0]]), ([[1.0], [1.0, 2.0]], [[1.0]])):
                with self.assertRaises(ValueError):
                    gpu.matmul(a, b)

    @unittest.skipUnless(os.path.exists("/proc/self/statm"), "reads /proc")
    def test_many_products_and_many_openings_leak_nothing(self):
        def growth(f):
            """Pages of memory that f costs each time: the least of five, as pools of others grow now and then."""
            pages = []
            for _ in range(6):
                f()
                gc.collect()
                with open("/proc/self/statm") as file:
                    pages.append(int(file.read().split()[1]))
            return min(after - before for before, after in zip(pages, pages[1:]))

        def products():
            for _ in range(500):
                m, n, k = (rng.randint(1, 24) for _ in range(3))
                gpu.matmul([[0.5] * k] * m, [[0.5] * n] * k)

        def openings():
            for _ in range(25):
                with vulkan_gemm.VulkanGemm() as gpu:
                    gpu.matmul([[1.0]], [[1.0]])
                gpu.close()

        rng = random.Random(2)
        with vulkan_gemm.VulkanGemm() as gpu:
            self.assertLess(growth(products), 20)
        self.assertLess(growth(openings), 2000 if sys.implementation.name == "pypy" else 25)

    def test_every_call_that_fails_is_one_error_that_names_it(self):
        real = vulkan_gemm.Vulkan._checked
        calls = [name for name, kind, _ in re.findall(r"(\w+)([=:])(\w+)", vulkan_gemm.FUNCTIONS) if kind == "="]
        failed = set()
        for name, code, words in [(name, -2, "OUT_OF_DEVICE_MEMORY") for name in calls] + [
            ("vkQueueSubmit", -4, "DEVICE_LOST")
        ]:

            def failing(each, function):
                def call(*args):
                    vulkan_gemm.check(name, code) if each == name else checked(*args)

                checked = real(each, function)
                return call

            with (
                self.subTest(name),
                unittest.mock.patch.object(vulkan_gemm.Vulkan, "_checked", staticmethod(failing)),
            ):
                try:
                    with vulkan_gemm.VulkanGemm() as gpu:
                        gpu.matmul([[1.0]], [[1.0]])
                except vulkan_gemm.VulkanError as error:
                    self.assertRegex(str(error), f"^{name}: VK_ERROR_{words}[^\n]*$")
                    failed.add(name)
        self.assertGreater(len(failed), len(calls) - 6)  # a few are made on some machines alone
        with vulkan_gemm.VulkanGemm() as gpu:
            self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])

    @unittest.skipUnless(HAS_LAYER, "needs the Khronos validation layer")
    def test_the_validation_layer_has_nothing_to_say(self):
        fresh = self.file(
            "fresh.py", PRODUCTS.replace("with", "vulkan_gemm.load_shader = vulkan_gemm.compile_shader\nwith", 1)
        )
        scripts = [self.file("shipped.py", PRODUCTS)] + ([fresh] if shutil.which("glslc") else [])
        for script in scripts:
            for memory in ("direct", "staging"):
                environment = {
                    **os.environ,
                    "PYTHONPATH": HERE,
                    "VK_INSTANCE_LAYERS": LAYER,
                    "VK_LAYER_ENABLES": "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT",
                }
                done = subprocess.run(
                    [sys.executable, script, memory],
                    env=environment,
                    cwd=self.folder.name,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                self.assertEqual((done.returncode, done.stdout), (0, b""), script)

    def test_the_losses_are_those_of_the_tensor_engine(self):
        flags = "--steps 6 --layers 2 --d-model 32 --context 32 --batch-size 4 --stream --lr 0.001".split()
        runs = [self.run_script(*flags, "--samples", "0", *engine) for engine in ([], ["--vulkan"])]
        self.assertEqual([(done.returncode, done.stderr) for done in runs], [(0, "")] * 2)
        losses = [list(map(float, re.findall(r"loss (\S+)\r", done.stdout))) for done in runs]
        self.assertEqual(len(losses[0]), 6)
        for a, b in zip(*losses):
            self.assertLess(abs(a - b), 1e-3 * a)

    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy multiplies so fast that few products gain")
    def test_the_products_of_the_model_really_go_to_the_gpu(self):
        sent = []
        real = vulkan_gemm.VulkanGemm.matmuls

        def counted(gpu, a, b, *transposes):
            sent.append(len(a))
            return real(gpu, a, b, *transposes)

        try:
            with unittest.mock.patch.object(vulkan_gemm.VulkanGemm, "matmuls", counted):
                self.assertIs(microgpt.use_engine("vulkan"), Tensor)
                sent.clear()
                config = Config(30, 1, 64, 4, 64)
                weights = microgpt.initial_weights(config, random.Random(1))
                loss, _ = microgpt.loss_and_grads(Tensor, config, weights, [list(range(30)) * 2] * 4)
        finally:
            microgpt.use_engine("tensor")
            microgpt.gpu_products.cache_clear()
        self.assertGreater(len(sent), 15)
        self.assertIn(32, sent)  # attention: all heads of both blocks of all documents at once
        wanted, _ = microgpt.loss_and_grads(Tensor, config, weights, [list(range(30)) * 2] * 4)
        self.assertAlmostEqual(loss, wanted, 4)

    def test_a_device_that_there_is_not_is_refused(self):
        for index in ("99", "x"):
            done = self.run_script("--vulkan", "--steps", "1", env={"MICROGPT_VULKAN_DEVICE": index})
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
            self.assertRegex(done.stderr, "^microgpt: error: the GPU cannot go on: .*MICROGPT_VULKAN_DEVICE")


# 12. All the cores ----------------------------------------------------------------------------------------


def children(pid):
    """The processes that a process has started and that are still there, dead or alive."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return list(map(int, file.read().split()))


def gone(pid):
    """Whether a process is not there, or dead and only waiting to be forgotten."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def heeded(names):
    """Those signals that end a process: nohup, for one, has all that it starts ignore SIGHUP."""
    numbers = [getattr(signal, name) for name in names.split()]
    return [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]


SEES_PROCESSES = os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children")


class TestWorkers(Files):
    def losses(self, *flags, name="trace.jsonl"):
        """The losses, with all their digits, of a run that must end well."""
        path = os.path.join(self.folder.name, name)
        done = self.run_script("--samples", "0", "--trace", path, *flags)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with open(path, encoding="utf-8") as file:
            return [json.loads(line)["loss"] for line in file]

    def content(self, name):
        with open(os.path.join(self.folder.name, name), "rb") as file:
            return file.read()

    def assertSame(self, got, wanted):
        self.assertEqual(len(got), len(wanted))
        for a, b in zip(got, wanted):
            self.assertAlmostEqual(a / b, 1, delta=1e-9)

    def setUp(self):
        super().setUp()
        self.file("input.txt", "".join(f"{name}\n" for name in "emma olivia ava bo christopher isabella jo".split()))

    def test_the_mean_over_shares_of_any_size_is_that_of_the_batch(self):
        config, weights = model()
        rng = random.Random(3)
        batch = [[rng.randrange(11) for _ in range(n)] for n in (9, 2, 5, 3, 7)]
        loss, grads = microgpt.loss_and_grads(Tensor, config, weights, batch)
        for n in (2, 3, 5):
            workers = microgpt.Workers(n, "tensor", config)
            for _ in range(2):
                got_loss, got_grads = workers(weights, batch)
                self.assertAlmostEqual(got_loss, loss, 12)
                self.assertEqual(list(got_grads), list(grads))
                self.assertClose(got_grads, grads, 1e-12)
            workers.stop()
            self.assertTrue(all(process.exitcode is not None for process in workers.processes))

    def test_1_2_and_4_workers_come_to_the_same_losses_in_50_steps(self):
        for flags in (["--batch-size", "5"], ["--batch-size", "4", "--stream", "--context", "12"]):
            flags += ["--steps", "50", "--layers", "2"]
            one = self.losses(*flags)
            self.assertEqual(len(one), 50)
            for n in ("2", "4"):
                self.assertSame(self.losses(*flags, "--workers", n), one)

    def test_as_many_workers_come_to_the_same_bytes_each_time(self):
        for n in ("2", "3"):
            for name in ("a.safetensors", "b.safetensors"):
                self.losses("--steps", "20", "--batch-size", "4", "--workers", n, "--save", name)
            self.assertEqual(self.content("a.safetensors"), self.content("b.safetensors"))

    def test_a_run_goes_on_with_other_workers(self):
        flags = ["--batch-size", "4", "--schedule", "constant"]
        whole = self.losses("--steps", "20", *flags)
        self.losses("--steps", "10", "--workers", "2", "--save", "a.safetensors", *flags)
        for n in ("1", "3", "4"):
            path = shutil.copy(os.path.join(self.folder.name, "a.safetensors"), os.path.join(self.folder.name, n))
            self.assertSame(self.losses("--resume", path, "--steps", "20", "--workers", n, name=n + ".jsonl"), whole[10:])

    def test_every_way_to_start_a_process(self):
        one = self.losses("--steps", "3", "--batch-size", "4", name="one.jsonl")
        driver = self.file(
            "driver.py",
            f"import multiprocessing, sys\nsys.path.insert(0, {HERE!r})\nimport microgpt\n"
            "if __name__ == '__main__':\n    multiprocessing.set_start_method(sys.argv[1])\n"
            "    sys.exit(microgpt.main(sys.argv[2:]))\n",
        )
        for method in multiprocessing.get_all_start_methods():
            flags = ["--steps", "3", "--batch-size", "4", "--workers", "2", "--samples", "0", "--trace", method + ".jsonl"]
            done = self.run_script(method, *flags, script=driver)
            self.assertEqual((done.returncode, done.stderr), (0, ""), method)
            self.assertSame([json.loads(line)["loss"] for line in self.content(method + ".jsonl").splitlines()], one)

    def test_the_scalar_engine_has_workers_too(self):
        flags = ["--steps", "2", "--batch-size", "2", "--d-model", "4", "--engine", "scalar"]
        self.assertSame(self.losses(*flags, "--workers", "2"), self.losses(*flags))

    def test_more_workers_than_documents_are_refused(self):
        self.assertRefused(2, "--workers 3 is more than --batch-size 2", "--batch-size", "2", "--workers", "3")
        self.assertRefused(2, "--workers", "--workers", "0")

    def start(self, *flags):
        """A long run with two workers, that has begun to train, and its workers."""
        flags = "--steps", "1000000", "--batch-size", "4", "--workers", "2", "--save", "a.safetensors", *flags
        process = subprocess.Popen(
            [sys.executable, "-u", SCRIPT, *flags],
            cwd=self.folder.name,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        process.stdout.read(200)
        workers = children(process.pid)
        self.assertEqual(len(workers), 2)
        self.addCleanup(self.kill, workers)
        return process, workers

    def kill(self, processes):
        for pid in processes:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)

    def assertGone(self, processes, seconds=5):
        end = time.monotonic() + seconds
        while not all(map(gone, processes)):
            self.assertLess(time.monotonic(), end, "a worker is left over")
            time.sleep(0.05)

    def assertEnds(self, process, workers, status, pattern):
        """It ends by itself, with one line, a checkpoint that can be resumed, and nothing left over."""
        _, errors = process.communicate(timeout=20)
        self.assertEqual((process.returncode, errors.count(b"\n")), (status, 1), errors)
        self.assertRegex(errors.decode(), pattern)
        self.assertGone(workers)
        at = int(re.search(r"step (\d+) is saved in a.safetensors", errors.decode()).group(1))
        done = self.run_script("--resume", "a.safetensors", "--steps", str(at + 1), "--workers", "1", "--samples", "1")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn(f"step {at + 1:4d}", done.stdout)

    @unittest.skipUnless(SEES_PROCESSES, "needs /proc")
    def test_a_worker_that_is_killed_ends_the_run(self):
        for number in heeded("SIGKILL SIGSEGV SIGHUP SIGABRT SIGUSR1"):
            process, workers = self.start()
            os.kill(workers[number % 2], number)
            line = rf"^microgpt: error: worker {number % 2 + 1} of 2: it has died \(exit code -{int(number)}\); step"
            self.assertEnds(process, workers, 1, line)

    @unittest.skipUnless(SEES_PROCESSES, "needs /proc")
    def test_signals_that_are_for_the_parent_leave_workers_alone(self):
        process, workers = self.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            for pid in workers:
                os.kill(pid, number)
        process.stdout.read(3000)
        process.send_signal(signal.SIGTERM)
        self.assertEnds(process, workers, 143, "^microgpt: interrupted: step")

    def test_workers_that_cannot_start_are_one_line(self):
        start, started = multiprocessing.process.BaseProcess.start, []

        def last(process):
            if started:
                raise OSError(errno.EMFILE, "Too many open files")
            started.append(process)
            start(process)

        config, _ = model()
        with unittest.mock.patch("multiprocessing.process.BaseProcess.start", last):
            with self.assertRaisesRegex(UserError, "^cannot start 2 workers: Too many open files$"):
                microgpt.Workers(2, "tensor", config)
        started[0].kill()
        started[0].join()
        with unittest.mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            with self.assertRaisesRegex(UserError, "^cannot start 2 workers: can't start new thread$"):
                microgpt.Workers(2, "tensor", config)

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_a_signal_while_workers_are_stopped_at_the_end_changes_nothing(self):
        code = f"import os, signal, sys; sys.path.insert(0, {HERE!r}); import microgpt\nstop = microgpt.Workers.stop\n"
        code += "def interrupted(self):\n    os.kill(os.getpid(), signal.SIGTERM)\n    stop(self)\n"
        code += "microgpt.Workers.stop = interrupted\nsys.exit(microgpt.main())"
        flags = "--steps", "2", "--samples", "1", "--workers", "2", "--batch-size", "2"
        done = self.run_script(*flags, script=self.file("driver.py", code))
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @unittest.skipUnless(hasattr(os, "fork"), "needs POSIX signals")
    def test_a_signal_while_workers_start_is_not_lost(self):
        start, caught = multiprocessing.process.BaseProcess.start, []

        def interrupted(process):
            os.kill(os.getpid(), signal.SIGINT)
            start(process)

        before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
        self.addCleanup(signal.signal, signal.SIGINT, before)
        config, weights = model()
        with unittest.mock.patch("multiprocessing.process.BaseProcess.start", interrupted):
            workers = microgpt.Workers(2, "tensor", config)
        self.assertTrue(caught)
        workers(weights, [[1, 2], [3, 4]])
        workers.stop()

    @unittest.skipUnless(SEES_PROCESSES, "needs /proc")
    def test_a_worker_that_hangs_ends_the_run_but_a_rest_of_all_does_not(self):
        process, workers = self.start()
        resting, others = self.start("--batch-size", "64", "--save", "b.safetensors")
        for pid in [workers[1], *others, resting.pid]:
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        self.assertEnds(process, workers, 1, "^microgpt: error: worker 2 of 2: no sign of life; step")
        self.assertLess(time.monotonic() - start, 25)
        for pid in [resting.pid, *others]:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)
        resting.stdout.read(1_000)
        self.assertIsNone(resting.poll())
        resting.send_signal(signal.SIGINT)
        resting.communicate(timeout=20)
        self.assertEqual(resting.returncode, 130)
        self.assertGone(others)

    @unittest.skipUnless(SEES_PROCESSES, "needs /proc")
    def test_workers_end_with_their_parent(self):
        for number in heeded("SIGKILL SIGHUP"):
            process, workers = self.start()
            process.send_signal(number)
            process.wait(timeout=5)
            self.assertGone(workers)

    @unittest.skipUnless(SEES_PROCESSES, "needs /proc")
    def test_a_busy_worker_ends_with_its_parent_too(self):
        command = [sys.executable, SCRIPT, "--batch-size", "100000", "--workers", "2"]  # a step takes half a minute
        process = subprocess.Popen(command, cwd=self.folder.name, stdout=subprocess.DEVNULL)
        self.addCleanup(process.kill)
        while len(children(process.pid)) < 2:
            time.sleep(0.05)
        time.sleep(1)
        workers = children(process.pid)
        self.addCleanup(self.kill, workers)
        process.kill()
        process.wait(timeout=5)
        self.assertGone(workers)

    @unittest.skipUnless(hasattr(os, "fork"), "needs a worker that is a copy of this process")
    def test_a_long_step_is_no_sign_of_death_but_half_a_message_is(self):
        config, weights = model()

        def slow(*args):
            time.sleep(4.5)
            return 2.0, weights

        def half(pipe, *args):
            os.write(pipe.fileno(), b"\0\0\1\0half")  # it promises 256 bytes
            time.sleep(60)

        context = partial(multiprocessing.get_context, "fork")
        with unittest.mock.patch("multiprocessing.get_context", lambda method: context()):
            with unittest.mock.patch("microgpt.loss_and_grads", slow):
                workers = microgpt.Workers(2, "tensor", config)
            with unittest.mock.patch("microgpt.work", half):
                stuck = microgpt.Workers(2, "tensor", config)
        results = []
        thread = threading.Thread(target=lambda: results.append(workers(weights, [[1, 2], [3, 4]])))
        thread.start()
        with self.assertRaisesRegex(microgpt.Halt, "^worker 1 of 2: no sign of life$"):
            stuck(weights, [[1, 2], [3, 4]])
        thread.join()
        workers.stop()
        stuck.stop()
        self.assertEqual(results, [(2.0, weights)])

    @unittest.skipUnless(SEES_PROCESSES, "needs /proc")
    def test_a_resting_worker_ends_with_its_parent_too(self):
        process, workers = self.start("--gen-every", "1", "--max-tokens", "1000000")  # sampling goes on and on
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=5)
        self.assertGone(workers)

    @unittest.skipUnless(hasattr(os, "fork"), "needs a worker that is a copy of this process")
    def test_what_goes_wrong_in_a_worker_is_told(self):
        config, weights = model()
        halt = microgpt.Halt("the GPU cannot go on")
        context = partial(multiprocessing.get_context, "fork")
        for error, message in ((halt, str(halt)), (MemoryError(), "there is not enough memory")):
            with unittest.mock.patch("multiprocessing.get_context", lambda method: context()):
                with unittest.mock.patch("microgpt.loss_and_grads", side_effect=error):
                    workers = microgpt.Workers(2, "tensor", config)
            with self.assertRaisesRegex(microgpt.Halt, f"^worker 1 of 2: {message}"):
                workers(weights, [[1, 2], [3, 4]])
            workers.stop()


# 14. Optimizers -------------------------------------------------------------------------------------------


class TestOptimizers(Test):
    settings = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}

    def steps(self, name):
        """Three steps of an optimizer on random gradients: the weights before and after, and the gradients."""
        rng = random.Random(4)
        weights = {"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)}
        before, grads = flat(weights), [{"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)} for _ in range(3)]
        m, v = microgpt.zeros(weights), microgpt.zeros(weights)
        for step, g in enumerate(grads):
            microgpt.OPTIMIZERS[name](weights, g, m, v, step, 0.1, **self.settings)
        return before, flat(weights), [flat(g) for g in grads]

    def test_three_steps_of_each_against_its_formula(self):
        lr, b1, b2, eps, decay = 0.1, 0.9, 0.95, 1e-3, 0.1

        def hats(m, v, t):
            return lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)

        formulas = {
            "sgd": lambda w, g, m, v, t: (w - lr * g, m, v),
            "momentum": lambda w, g, m, v, t: (w - lr * (b1 * m + g), b1 * m + g, v),
            "rmsprop": lambda w, g, m, v, t: (
                w - lr * g / (math.sqrt(b2 * v + (1 - b2) * g * g) + eps),
                m,
                b2 * v + (1 - b2) * g * g,
            ),
            "adam": lambda w, g, m, v, t: (
                w - hats(b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, t),
                b1 * m + (1 - b1) * g,
                b2 * v + (1 - b2) * g * g,
            ),
            "adamw": lambda w, g, m, v, t: (
                w * (1 - lr * decay) - hats(b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, t),
                b1 * m + (1 - b1) * g,
                b2 * v + (1 - b2) * g * g,
            ),
        }
        self.assertEqual(list(formulas), list(microgpt.OPTIMIZERS))
        for name, formula in formulas.items():
            before, after, grads = self.steps(name)
            for i, w in enumerate(before):
                m = v = 0.0
                for t, g in enumerate(grads, 1):
                    w, m, v = formula(w, g[i], m, v, t)
                self.assertAlmostEqual(after[i], w, 13, name)

    def test_adamw_without_decay_is_adam(self):
        self.settings = {**self.settings, "weight_decay": 0.0}
        self.assertEqual(self.steps("adamw")[1], self.steps("adam")[1])

    def test_each_lowers_the_loss_on_names(self):
        docs = microgpt.read_documents([os.path.join(HERE, "input.txt")])[:200]
        tokenizer = CharTokenizer(docs)
        config = Config(tokenizer.vocab_size)
        for name, optimizer in microgpt.OPTIMIZERS.items():
            lr = 0.3 if name == "sgd" else 0.05 if name == "momentum" else 0.01
            weights = microgpt.initial_weights(config, random.Random(1))
            batch_at = microgpt.document_batches(docs, tokenizer.encode, tokenizer.bos, 16, 2)
            losses = train(Tensor, config, weights, batch_at, 100, lr=lr, optimizer=optimizer)
            self.assertLess(statistics.mean(losses[-20:]), statistics.mean(losses[:5]) - 0.3, name)

    def test_clipping_leaves_small_gradients_alone_and_scales_large_ones_to_the_norm(self):
        seen = []
        optimizer = microgpt.clipped(lambda weights, grads, *args, **settings: seen.append(grads), 2.0)
        small, large = {"a": [[1.0, -1.0]], "b": [[0.5]]}, {"a": [[30.0, -40.0]], "b": [[0.0]]}
        optimizer(None, small)
        self.assertIs(seen[0], small)
        optimizer(None, large)
        self.assertAlmostEqual(math.hypot(*flat(seen[1])), 2.0, 12)
        self.assertClose(seen[1], [[1.2, -1.6, 0.0]], 1e-12)
        self.assertEqual(large, {"a": [[30.0, -40.0]], "b": [[0.0]]})

    def test_schedules_at_their_corners(self):
        rate = lambda name, step, warmup=10, steps=110: microgpt.learning_rate(
            step, steps, 0.5, warmup, microgpt.SCHEDULES[name]
        )
        for name in microgpt.SCHEDULES:
            self.assertAlmostEqual(rate(name, 0), 0.05, 12)
            self.assertAlmostEqual(rate(name, 9), 0.5, 12)
            self.assertAlmostEqual(rate(name, 10), 0.5, 12)
            self.assertAlmostEqual(rate(name, 0, 0), 0.5, 12)
            self.assertAlmostEqual(rate(name, 99, 100, 100), 0.5, 12)
        self.assertAlmostEqual(rate("linear", 60), 0.25, 12)
        self.assertAlmostEqual(rate("linear", 109), 0.005, 12)
        self.assertAlmostEqual(rate("cosine", 60), 0.25, 12)
        self.assertAlmostEqual(rate("cosine", 35), 0.25 * (1 + math.sqrt(0.5)), 12)
        self.assertAlmostEqual(rate("cosine", 109), 0.25 * (1 + math.cos(math.pi * 0.99)), 12)
        self.assertAlmostEqual(rate("constant", 109), 0.5, 12)

    def test_clipping_goes_by_the_norm_of_all_gradients_together(self):
        seen = []
        optimizer = microgpt.clipped(lambda weights, grads, *args, **settings: seen.append(grads), 2.0)
        optimizer(None, {"a": [[2.0, 0.0], [0.0, -3.0]], "b": [[6.0]]})  # its norm is 7
        self.assertClose(seen[0], [[4 / 7, 0.0, 0.0, -6 / 7, 12 / 7]], 1e-12)
        optimizer(None, {"a": [[1.5]], "b": [[1.5]]})  # none of them is above the limit, together they are
        self.assertAlmostEqual(math.hypot(*flat(seen[1])), 2.0, 12)


# 15. Checkpoints ------------------------------------------------------------------------------------------


def load(path):
    """The state and the flags in a checkpoint."""
    return microgpt.load_state(path, microgpt.make_parser().parse_args)


class TestCheckpoints(Files):
    def setUp(self):
        super().setUp()
        names = microgpt.read_documents([os.path.join(HERE, "input.txt")])[:60]
        self.corpus = self.file("names.txt", "\n".join(names))
        self.path = os.path.join(self.folder.name, "run.safetensors")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.addCleanup(lambda: [signal.signal(*pair) for pair in handlers.items()])
        self.addCleanup(gc.enable)

    def main(self, *flags):
        """Run the command line in this process. Returns status, standard output and standard error."""
        streams, before = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in "oe"], (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = streams
        try:
            status = microgpt.main(["--corpus", self.corpus, *flags])
        finally:
            sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
        return (status, *(stream.buffer.getvalue().decode().replace(os.linesep, "\n") for stream in streams))

    def saved(self, *flags):
        """The bytes of a checkpoint after a few steps."""
        self.assertEqual(self.main("--steps", "3", "--samples", "0", "--save", self.path, *flags)[::2], (0, ""))
        with open(self.path, "rb") as file:
            return file.read()

    def test_a_resumed_run_is_exactly_the_run_that_was_not_interrupted(self):
        smooth = "--cosine --warmup-steps 7 --batch-size 2"
        for flags in (
            *(f"--optimizer {name} {smooth}" for name in microgpt.OPTIMIZERS),
            "--stream --val-fraction 0.2 --eval-every 10 --gen-every 10",
            "--arch gpt2 --clip-grad 1 --val-fraction 0.1 --eval-every 15 --gen-every 20 --vocab-size 20",
            "--stream --vocab-size 30 --batch-size 2 --weight-decay 0.1 --optimizer adamw",
        ):
            flags = [
                *flags.split(),
                *"--steps 60 --d-model 8 --context 8 --samples 3 --save-every 25 --div-warn 1e9".split(),
            ]
            copies, write = [], microgpt.write_safetensors

            def write_and_copy(path, tensors, metadata):
                write(path, tensors, metadata)
                with open(path, "rb") as file:
                    copies.append(file.read())

            with self.subTest(flags=flags), unittest.mock.patch("microgpt.write_safetensors", write_and_copy):
                status, whole, _ = self.main(*flags, "--save", self.path)
                self.assertEqual((status, len(copies)), (0, 3))
                part = self.file("part.safetensors", copies[0])
                status, rest, errors = self.main("--resume", part)
                self.assertEqual(status, 0, errors)
                self.assertEqual(copies[-1], copies[2])
                self.assertEqual(rest[rest.index("--- inference") :], whole[whole.index("--- inference") :])
                self.assertEqual(re.findall(r"loss (\S+)\r", rest), re.findall(r"loss (\S+)\r", whole)[25:])

    def test_a_finished_run_samples_at_once_and_a_longer_one_goes_on(self):
        self.saved()
        before = os.stat(self.path).st_mtime_ns
        status, out, _ = self.main("--resume", self.path, "--samples", "2")
        self.assertEqual((status, out.count("loss"), out.count("sample ")), (0, 0, 2))
        self.assertEqual(os.stat(self.path).st_mtime_ns, before)
        status, out, _ = self.main("--resume", self.path, "--steps", "5", "--lr", "0.5")
        self.assertEqual(re.findall(r"step +(\d+) /", out), ["4", "5"])
        state, flags = load(self.path)
        self.assertEqual((state.step, flags.steps, flags.lr), (5, 5, 0.5))

    def test_no_steps_sample_any_run_and_leave_its_file_alone(self):
        content = self.saved("--warmup-steps", "2")
        status, out, errors = self.main("--resume", self.path, "--steps", "0", "--samples", "2")
        self.assertEqual((status, errors, out.count("sample "), out.count("loss")), (0, "", 2, 0))
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), content)

    def test_a_second_moment_below_0_is_refused(self):
        self.saved()
        state, _ = load(self.path)
        state.v["wte"][0][0] = -1e-9
        state.save(self.path, [])
        with self.assertRaisesRegex(UserError, "second moment"):
            load(self.path)

    def test_saving_goes_elsewhere_if_told_so(self):
        content, other = self.saved(), os.path.join(self.folder.name, "other.safetensors")
        self.main("--resume", self.path, "--steps", "5", "--save", other)
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), content)
        self.assertEqual(load(other)[0].step, 5)
        os.remove(other)
        self.main("--resume", self.path, "--samples", "1", "--save", other)  # a finished run has no step to save
        self.assertTrue(load(other)[0].weights == load(self.path)[0].weights)

    def test_initial_weights_are_saved_by_no_steps(self):
        self.saved("--steps", "0")
        state, _ = load(self.path)
        rng = random.Random(42)
        rng.shuffle(list(range(60)))
        self.assertEqual(state.weights, microgpt.initial_weights(state.config, rng))

    def test_a_flag_that_contradicts_the_model_is_refused_with_both_values(self):
        self.saved("--vocab-size", "9")
        for flags, message in (
            ("--d-model 32", "--d-model 32 contradicts .*, which has 16"),
            ("--layers 2", "--layers 2 contradicts .*, which has 1"),
            ("--vocab-size 5", "--vocab-size 5 contradicts .*, which has 9"),
            ("--arch gpt2", "--arch gpt2 contradicts .*, which has microgpt"),
        ):
            status, _, errors = self.main("--resume", self.path, *flags.split())
            self.assertEqual((status, errors.count("\n")), (2, 1))
            self.assertRegex(errors, "^microgpt: error: " + message)

    def test_a_corpus_with_new_characters_is_refused(self):
        self.saved()
        self.corpus = self.file("other.txt", "\u03b1\u03b2\u03b3")
        status, out, errors = self.main("--resume", self.path, "--steps", "9")
        self.assertEqual((status, errors.count("\n"), "step" in out), (1, 1, False))
        self.assertIn("\u03b1", errors)

    def test_what_safetensors_asks_of_a_file(self):
        content = self.saved()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        self.assertEqual(length % 8, 0)
        self.assertTrue(all(type(value) is str for value in header.pop("__metadata__").values()))
        state, _ = load(self.path)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            numbers = array("d", content[8 + length + start : 8 + length + stop]).tolist()
            matrix, kind = state.weights, name.split(".")
            if kind[0] == "optimizer":
                matrix, name = getattr(state, kind[1]), ".".join(kind[2:])
            self.assertEqual((numbers, entry["dtype"]), (flat(matrix[name]), "F64"))
            self.assertEqual(entry["shape"], [len(matrix[name]), len(matrix[name][0])])

    def rewritten(self, change_header=None, dtype=None):
        """The saved file, its header changed, or its weights alone in another type."""
        content = self.saved()
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        if dtype:
            parts, at, metadata = [], 0, header.pop("__metadata__")
            for name in [name for name in header if not name.startswith("optimizer.")]:
                start, stop = header[name]["data_offsets"]
                parts.append(array("f", array("d", data[start:stop])).tobytes())
                header[name].update(dtype="F32", data_offsets=[at, at + len(parts[-1])])
                at += len(parts[-1])
            header = {name: entry for name, entry in header.items() if not name.startswith("optimizer.")}
            header["__metadata__"], data = metadata, b"".join(parts)
        if change_header:
            header = change_header(header)
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    def test_weights_in_single_precision_resume(self):
        self.file("run.safetensors", self.rewritten(dtype="F32"))
        status, out, errors = self.main("--resume", self.path, "--steps", "5", "--samples", "1")
        self.assertEqual((status, errors, out.count("loss")), (0, "", 2))

    def test_damaged_files_are_one_line_and_cost_nothing(self):
        content = self.saved()
        rng, length = random.Random(9), int.from_bytes(content[:8], "little")
        base = {"__metadata__": {}}
        damaged = [content[:n] for n in [*range(10), 8 + length - 1, 8 + length, 8 + length + 1, len(content) - 1]]
        damaged += [content[: rng.randrange(len(content))] for _ in range(100)]
        damaged += [content + b"x", b"", b"{}", b"\0" * 100, content[8:], content * 2]
        for n in (0, 1, 7, length - 1, length + 1, len(content), 2**32, 2**63, 2**64 - 1):
            damaged.append(n.to_bytes(8, "little") + content[8:])
        for text in (
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"1" * 100_000,
            b"null",
            b"[]",
            b"{}",
            b'{"a":1}',
            b'"a"',
            b"\xff",
            b" " * 3_000_000,
            b"[" + b"{}," * 1_000_000 + b"{}]",
            b'{"__metadata__":[]}',
            b'{"__metadata__":{"a":1}}',
            b'{"__metadata__":{},"a":{"dtype":NaN}}',
        ):
            damaged.append(len(text).to_bytes(8, "little") + text + content[8 + length :])

        def metadata(name, value):
            def change(header):
                header["__metadata__"][name] = value
                return header

            return change

        def entry(key, value, name="wpe"):
            def change(header):
                header[name][key] = value
                return header

            return change

        def without(name):
            return lambda header: {key: value for key, value in header.items() if key != name}

        def renamed(old, new):
            return lambda header: {new if key == old else key: value for key, value in header.items()}

        changes = [
            lambda header: base,
            without("__metadata__"),
            without("wte"),
            without("optimizer.m.wte"),
            renamed("wpe", "wpf"),
            renamed("optimizer.v.wpe", "optimizer.w.wpe"),
            renamed("wpe", "a\nb"),
        ]
        for key in ("dtype", "shape", "data_offsets"):
            for value in (
                None,
                1,
                "F64x",
                "BF16",
                [],
                [1],
                [16, 16, 1],
                [0, 16],
                [-16, -16],
                [16.0, 16],
                ["16", 16],
                [True, 256],
                [16, 10**18],
                [0, 2**63],
                {"a": 1},
                [[16], 16],
                [0, 0],
                [8, 2056],
                [8, 32],
                [256, 1],
            ):
                changes.append(entry(key, value))
        for name in ("flags", "characters", "merges", "step", "seen", "recent", "random"):
            for value in (
                "",
                "null",
                "[]",
                "{}",
                "2",
                "-1",
                '"x"',
                "[" * 5000,
                "1e999",
                "NaN",
                "[[0, 1]]",
                "[1, 2, 3]",
                "9" * 5000,
            ):
                harmless = "step 2, seen 2, seen -1, seen NaN, merges [], merges {}, flags [], flags {}".split(", ")
                if f"{name} {value}" not in harmless:
                    changes.append(metadata(name, value))
            changes.append(
                lambda header, name=name: {
                    **header,
                    "__metadata__": {key: value for key, value in header["__metadata__"].items() if key != name},
                }
            )
        doubling = [[26 + i, 26 + i] for i in range(60)]
        changes += [
            metadata("merges", json.dumps(m))
            for m in ([[0, 99]], [[0]], [[-1, 0]], [["a", "b"]], [[0, 0]] + doubling)
        ]
        for flag in (
            "--steps=x --lr=-1 --nonsense=1 --d-model=32 --heads=3 --arch=gpt2 --layers=1000000000 --context=9"
            " --n-embd=16.0 --save=x --resume=x --plot=x.svg --help -h -hh names.txt"
        ).split():
            changes.append(metadata("flags", json.dumps([flag])))
        changes += [metadata("flags", json.dumps(flags)) for flags in ([["--steps=1"]], [None], {"-h": 1}, [1.5])]
        damaged += [self.rewritten(change) for change in changes]
        for number in (math.nan, math.inf, -math.inf):
            at = 8 + length + 8 * rng.randrange((len(content) - 8 - length) // 8)
            damaged.append(content[:at] + array("d", [number]).tobytes() + content[at + 8 :])
        surely = len(damaged)
        while len(damaged) < 520:  # flipped bits need not be noticed, a digit may become another
            at = rng.randrange(8 + length)
            damaged.append(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        for i, content in enumerate(damaged):
            self.file("run.safetensors", content)
            start = time.process_time()
            try:
                status, out, errors = self.main("--resume", self.path, "--steps", "0", "--samples", "0")
            except Exception as error:
                self.fail(f"file {i}: {error!r}")
            self.assertLess(time.process_time() - start, 5 if sys.implementation.name == "pypy" else 1, i)
            if status or i < surely:
                self.assertEqual((status, errors.count("\n"), out), (1, 1, ""), (i, errors))
                self.assertRegex(errors, "^microgpt: error: .*run.safetensors.* is not a ")

    def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(self):
        if not hasattr(os, "fork"):
            self.skipTest("needs a limit on the size of files")
        content = self.saved()
        code = "import resource, sys, microgpt; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        code += "sys.exit(microgpt.main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "--resume", self.path, "--steps", "6", "--samples", "0"],
            cwd=HERE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr.decode(), "^microgpt: error: cannot save .*run.safetensors: [^\n]*\n$")
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), content)
        self.assertEqual(sorted(os.listdir(self.folder.name)), ["names.txt", "run.safetensors"])

    def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(self):
        for path in (os.path.join(self.folder.name, "no", "such", "folder", "x"), self.folder.name):
            status, out, errors = self.main("--save", path, "--steps", "1")
            self.assertEqual((status, errors.count("\n"), out.count("step")), (1, 1, 0))
        self.assertEqual(os.listdir(self.folder.name), ["names.txt"])

    def test_nothing_but_a_checkpoint_is_replaced(self):
        status, out, errors = self.main("--save", self.corpus, "--steps", "1")
        self.assertEqual((status, errors.count("\n"), out.count("step")), (1, 1, 0))
        self.assertEqual(len(microgpt.read_documents([self.corpus])), 60)
        self.saved()
        self.saved("--seed", "2")

    def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(self):
        content = self.saved()
        flags = "--steps", "9", "--schedule", "constant", "--save-every", "1"
        overflow = "--optimizer adamw --weight-decay 1e9 --lr 1e300".split()
        status, _, errors = self.main("--resume", self.path, *flags, *overflow)
        self.assertEqual(status, 1)
        self.assertRegex(errors, "^microgpt: error: the weights have overflowed after step 4")
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), content)
        status, _, errors = self.main("--resume", self.path, *flags, "--lr", "1e300")
        self.assertRegex(errors, "^microgpt: error: the weights have overflowed after step 5")
        self.assertEqual((status, load(self.path)[0].step), (1, 4))

    def test_a_million_weights_are_saved_and_loaded_in_about_a_second(self):
        config = Config(50, 5, 128, 4, 64)
        weights = microgpt.initial_weights(config, random.Random(1))
        self.assertGreater(sum(len(row) for rows in weights.values() for row in rows), 990_000)
        tokenizer = CharTokenizer([chr(97 + i) for i in range(49)])
        rng, flags = random.Random(1), ["--layers=5", "--d-model=128", "--context=64"]
        state = microgpt.State(config, tokenizer, weights, microgpt.zeros(weights), microgpt.zeros(weights), rng)
        start = time.perf_counter()
        state.save(self.path, flags)
        middle = time.perf_counter()
        loaded, _ = load(self.path)
        self.assertLess(max(middle - start, time.perf_counter() - middle), 3)
        self.assertTrue(loaded.weights == weights)

    def start(self, *flags):
        """A long run as a process that has begun to train."""
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--corpus", self.corpus, "--steps", "1000000", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        return process

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_a_signal_in_training_ends_the_step_and_saves(self):
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            process = self.start("--save", self.path)
            process.stdout.read(5000)
            process.send_signal(number)
            out, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, status)
            self.assertRegex(errors.decode(), r"^microgpt: interrupted: step \d+ is saved in .*run.safetensors\n$")
            self.assertNotIn(b"sample", out)
            state, _ = load(self.path)
            self.assertIn(f"step {state.step} is saved", errors.decode())
            process = self.start()
            process.stdout.read(5000)
            process.send_signal(number)
            self.assertEqual(process.communicate(timeout=60)[1], b"microgpt: interrupted: nothing was saved\n")
            self.assertEqual(process.returncode, status)

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_a_second_signal_ends_at_once(self):
        process = self.start(
            "--engine", "scalar", "--context", "64", "--batch-size", "60", "--stream", "--save", self.path
        )
        while b"params" not in process.stdout.readline():
            pass
        time.sleep(0.5)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:  # two at once may count as one
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        self.assertEqual(process.poll(), 130)
        self.assertEqual(process.stderr.read(), b"")
        self.assertFalse(os.path.exists(self.path))  # the step, of several seconds, did not end

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_a_signal_in_sampling_or_learning_of_merges_ends_at_once(self):
        process = self.start("--steps", "1", "--samples", "1000000", "--save", self.path)
        process.stdout.read(20000)
        process.send_signal(signal.SIGINT)
        self.assertRegex(process.communicate(timeout=60)[1], b"^microgpt: interrupted: step 1 is saved in ")
        self.assertEqual(process.returncode, 130)
        rng = random.Random(1)
        self.corpus = self.file("long.txt", "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000)))
        process = self.start("--stream", "--vocab-size", "50000")
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.communicate(timeout=60)[1], b"microgpt: interrupted: nothing was saved\n")
        self.assertEqual(process.returncode, 143)

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_killed_at_any_moment_the_file_is_whole(self):
        rng, loaded = random.Random(7), 0
        for i in range(30):
            process = self.start("--save", self.path, "--save-every", "1")
            process.stdout.read(300)
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.communicate()
            if os.path.exists(self.path):
                load(self.path)
                loaded += 1
        self.assertGreater(loaded, 25)
        state, _ = load(self.path)
        steps = str(state.step + 2)
        status, out, errors = self.main("--resume", self.path, "--steps", steps, "--samples", "0")
        self.assertEqual((status, errors, out.count("loss")), (0, "", 2))

    def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(self):
        path, sizes = self.file("a", "old"), []
        with unittest.mock.patch("os.fsync", lambda _: sizes.append(os.path.getsize(path + microgpt.PART))):
            with microgpt.replacing(path) as file:
                file.write(b"whole")
        self.assertEqual(sizes, [5])

    def test_matrices_that_no_model_has_are_refused(self):
        def more(header):
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            return {**header, "stray": {"dtype": "F64", "shape": [1, 1], "data_offsets": [end, end + 8]}}

        content = self.rewritten(more) + bytes(8)
        with self.assertRaisesRegex(UserError, "matrices that it should not have"):
            load(self.file("run.safetensors", content))

    def test_a_resumed_run_averages_from_the_last_validation_on(self):
        flags = "--steps 9 --eval-every 4 --save-every 6 --val-fraction 0.1 --div-warn 1e9 --samples 0".split()
        copies, write = [], microgpt.write_safetensors

        def write_and_copy(path, tensors, metadata):
            write(path, tensors, metadata)
            with open(path, "rb") as file:
                copies.append(file.read())

        with unittest.mock.patch("microgpt.write_safetensors", write_and_copy):
            _, whole, _ = self.main(*flags, "--save", self.path)
        status, rest, errors = self.main("--resume", self.file("part.safetensors", copies[0]))
        judged = lambda out: re.findall(r"step[^\r\n]*validation[^\n]*", out)
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(judged(rest), judged(whole)[1:])

    def test_every_flag_of_the_model_is_held_to(self):
        self.saved()
        model = "--layers 2", "--d-model 32", "--heads 2", "--context 8", "--arch gpt2", "--vocab-size 5", "--stream"
        for flags in model:
            status, _, errors = self.main("--resume", self.path, *flags.split())
            self.assertEqual((status, errors.count("\n")), (2, 1), flags)
            self.assertRegex(errors, f"^microgpt: error: {flags.split()[0]} .* contradicts ")

    def test_signals_that_were_ignored_stay_ignored(self):
        for number in microgpt.STOPS:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signals = microgpt.Signals()
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.SIG_IGN)
        self.assertEqual(signal.getsignal(signal.SIGTERM), signals.catch)

    def test_a_resumed_run_reads_its_corpus_again_unless_it_is_given_another(self):
        self.saved()
        corpus = lambda *flags: microgpt.parse_args(["--resume", self.path, *flags])[0].corpus
        self.assertEqual((corpus(), corpus("--corpus", "b.txt")), ([self.corpus], ["b.txt"]))


# 16. Looking inside ---------------------------------------------------------------------------------------


def by_hand(config, weights, ids):
    """Probabilities and attention shares of a model, position after position, in loops and sums alone."""
    gpt2 = config.arch == "gpt2"

    def product(name, x):
        biases = weights[name + ".bias"][0] if gpt2 else repeat(0.0)
        return [sum(a * b for a, b in zip(row, x)) + bias for row, bias in zip(weights[name], biases)]

    def norm(x, name=""):
        mean = sum(x) / len(x) if gpt2 else 0.0
        x = [(a - mean) / math.sqrt(sum((b - mean) ** 2 for b in x) / len(x) + 1e-5) for a in x]
        return [a * g + b for a, g, b in zip(x, *weights[name], *weights[name + ".bias"])] if gpt2 else x

    def activation(a):
        soft = a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        return soft if gpt2 else max(0, a)

    def shares_of(scores):
        exps = [math.exp(a) for a in scores]
        return [a / sum(exps) for a in exps]

    size = config.n_embd // config.n_head
    past = [([], []) for _ in range(config.n_layer)]
    probabilities, maps = [], [[[] for _ in range(config.n_head)] for _ in range(config.n_layer)]
    for t, i in enumerate(ids):
        x = [a + b for a, b in zip(weights["wte"][i], weights["wpe"][t])]
        x = x if gpt2 else norm(x)
        for layer, (keys, values) in enumerate(past):
            h = norm(x, f"layer{layer}.ln1")
            q, k, v = (product(f"layer{layer}.attn_w{letter}", h) for letter in "qkv")
            keys.append(k)
            values.append(v)
            y = []
            for head in range(config.n_head):
                channels = range(head * size, (head + 1) * size)
                shares = shares_of([sum(q[c] * key[c] for c in channels) / math.sqrt(size) for key in keys])
                maps[layer][head].append(shares)
                y += [sum(share * value[c] for share, value in zip(shares, values)) for c in channels]
            x = [a + b for a, b in zip(x, product(f"layer{layer}.attn_wo", y))]
            h = list(map(activation, product(f"layer{layer}.mlp_fc1", norm(x, f"layer{layer}.ln2"))))
            x = [a + b for a, b in zip(x, product(f"layer{layer}.mlp_fc2", h))]
        probabilities.append(shares_of(product("lm_head", norm(x, "ln_f") if gpt2 else x)))
    return probabilities, maps


class TestExplain(Files):
    def setUp(self):
        super().setUp()
        self.tokenizer = CharTokenizer(["abcdefghij"])
        self.config, weights = model(n_head=4)
        self.weights = {name: [[2 * a for a in row] for row in rows] for name, rows in weights.items()}
        self.ids = [10, 0, 3, 3, 7, 1, 10]

    def lines(self, ids=None, **settings):
        return list(microgpt.explain(self.config, self.weights, self.tokenizer, ids or self.ids, **settings))

    def test_what_it_looks_at_is_what_a_computation_by_hand_finds(self):
        ids = [10, 0, 3, 3, 7, 1]
        for arch in ("microgpt", "gpt2"):
            config, weights = model(arch, n_head=4)
            weights = {name: [[2 * a for a in row] for row in rows] for name, rows in weights.items()}
            logits, maps = microgpt.look(config, weights, ids)
            probabilities, by_hand_maps = by_hand(config, weights, ids)
            self.assertClose(list(map(microgpt.softmax, logits)), probabilities)
            self.assertEqual((len(maps), len(maps[0])), (2, 4))
            for got, wanted in zip(sum(maps, []), sum(by_hand_maps, [])):
                self.assertEqual(list(map(len, got)), [1, 2, 3, 4, 5, 6])
                self.assertClose(got, wanted)
            self.assertGreater(max(abs(a - 1 / 6) for a in maps[1][2][5]), 0.1)  # it is not all the same

    def test_every_row_of_every_map_adds_up_to_1(self):
        for arch in ("microgpt", "gpt2"):
            config, weights = model(arch)
            _, maps = microgpt.look(config, weights, [1, 2, 3, 4, 5, 6, 7, 8])
            for row in sum(sum(maps, []), []):
                self.assertAlmostEqual(sum(row), 1, 12)
                self.assertGreater(min(row), 0)

    def test_numbers_that_have_overflowed_are_one_line(self):
        self.assertRefused(1, "overflowed", "--steps", "1", "--lr", "1e308", "--samples", "0", "--explain", "emma")

    def test_the_logits_are_those_of_training(self):
        for arch in ("microgpt", "gpt2"):
            config, weights = model(arch)
            wanted = logits(Tensor, config, weights, self.ids[:-1])
            self.assertEqual(microgpt.look(config, weights, self.ids[:-1])[0], wanted)

    def test_the_numbers_in_the_table(self):
        probabilities, _ = by_hand(self.config, self.weights, self.ids[:-1])
        lines = self.lines()
        total = 0.0
        for line, i, target, p in zip(lines[1:], self.ids, self.ids[1:], probabilities):
            name = lambda i: "abcdefghij^"[i]
            token, following, chance, nats, bits, *guesses = line.split()
            self.assertEqual((token, following), (name(i), name(target)))
            self.assertEqual(chance, f"{p[target]:.3f}")
            self.assertEqual((nats, bits), (f"{-math.log(p[target]):.3f}", f"{-math.log2(p[target]):.3f}"))
            best = sorted(range(11), key=p.__getitem__)[::-1][:5]
            self.assertEqual([guess for guess in guesses if guess in "abcdefghij^"], list(map(name, best)))
            total -= math.log(p[target]) / 6
        self.assertEqual(lines[7].split(), ["mean", f"{total:.3f}", f"{total / math.log(2):.3f}"])

    def test_the_shades_are_those_of_the_shares(self):
        _, maps = by_hand(self.config, self.weights, self.ids[:-1])
        lines = self.lines(blocks=False)
        first = next(i for i, line in enumerate(lines) if line.startswith("\nlayer 1"))
        for t in range(6):
            row = lines[first + 2 + t][7:].ljust(52)
            for head in range(4):
                cells = row[head * 13 :][: 2 * t + 2]
                self.assertEqual(cells[::2], cells[1::2])
                shades = [".:+*#".index(cell) for cell in cells[::2]]
                self.assertEqual(shades, [round(4 * share) for share in maps[1][head][t]])
            self.assertEqual(row[2 * t + 2 : 13].strip(), "")  # nothing of the future

    def test_16_tokens_and_4_heads_fit_80_columns_in_blocks_and_in_ascii(self):
        self.config, self.weights = model(n_embd=16, n_head=4, block_size=16)
        for blocks in (True, False):
            lines = "\n".join(self.lines([10, *range(10), *range(5), 10], blocks=blocks)).split("\n")
            self.assertLessEqual(max(map(len, lines)), 80)
            self.assertEqual(sum("heads 0 to 3" in line for line in lines), 2)
            self.assertEqual("\n".join(lines).isascii(), not blocks)

    def test_more_heads_than_fit_side_by_side_go_below_each_other(self):
        self.config, self.weights = model(n_embd=48, n_head=12, block_size=16)
        lines = "\n".join(self.lines([10, *range(10), *range(5), 10])).split("\n")
        self.assertLessEqual(max(map(len, lines)), 80)
        heads = [re.search(r"heads (\d+) to (\d+)", line).groups() for line in lines if "layer 1" in line]
        self.assertEqual(heads, [("0", "3"), ("4", "7"), ("8", "11")])

    def test_odd_tokens_keep_to_their_columns(self):
        tokens = "\n\t \\'\"é☃a^"
        self.tokenizer, self.ids = CharTokenizer([tokens]), [9, 8, 7, 6, 5, 4, 3, 2, 1]
        lines = self.lines()
        self.assertEqual({line[12:17].count(".") for line in lines[1:9]}, {1})
        self.assertTrue(all(line.isprintable() for line in "\n".join(lines).split("\n")))

    def test_a_probability_of_almost_0_is_no_infinite_loss(self):
        self.weights["lm_head"] = [[1e4 * a for a in row] for row in self.weights["lm_head"]]
        for line in self.lines()[1:8]:
            self.assertNotRegex(line, "inf|nan|Error")

    def test_after_training_and_from_a_checkpoint_it_says_the_same(self):
        self.file("input.txt", "emma\nolivia\nava\n")
        flags = ["--steps", "5", "--samples", "0", "--explain", "emma"]
        trained = self.run_script(*flags, "--save", "a.safetensors")
        resumed = self.run_script("--resume", "a.safetensors", "--explain", "emma", "--samples", "0")
        self.assertEqual((trained.returncode, trained.stderr, resumed.stderr), (0, "", ""))
        table = trained.stdout.index("token next")
        self.assertEqual(trained.stdout[table:], resumed.stdout[resumed.stdout.index("token next") :])
        self.assertRegex(trained.stdout[table:], r"\n\^     e     0\.\d{3} +\d\.\d{3}")

    def test_a_terminal_without_block_characters_gets_ascii(self):
        self.file("input.txt", "emma\nolivia\nava\n")
        for encoding in ("ascii", "latin-1", "cp1252"):
            done = self.run_script("--steps", "1", "--explain", "ava", env={"PYTHONIOENCODING": encoding})
            self.assertEqual((done.returncode, done.stderr, done.stdout.isascii()), (0, "", True))
            self.assertNotIn("\\u", done.stdout)

    def test_a_text_that_cannot_be_explained_is_refused_before_training(self):
        self.file("input.txt", "emma\nolivia\nava\n")
        self.assertIn("step", self.run_script("--steps", "1", "--explain", "").stdout)  # BOS, and BOS again
        done = self.assertRefused(1, "'x'", "--explain", "x")
        self.assertNotIn("loss", done.stdout)
        self.assertRefused(1, "two tokens", "--stream", "--context", "4", "--explain", "e")

    def test_a_text_longer_than_the_context_is_explained_up_to_there(self):
        self.file("input.txt", "emma\nolivia\nava\n")
        done = self.run_script("--steps", "1", "--samples", "0", "--context", "4", "--explain", "emmaava")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        lines = done.stdout[done.stdout.index("token next") :].splitlines()
        self.assertEqual([line.split()[:2] for line in lines[1:5]], [["^", "e"], ["e", "m"], ["m", "m"], ["m", "a"]])
        self.assertTrue(lines[5].startswith("mean"))


SVG = "{http://www.w3.org/2000/svg}"
RAW, MEAN, VALIDATION, RATE = "loss (nats a token)", "running mean", "in validation", "learning rate"


def noisy(steps, first=1, low=2.0):
    rng = random.Random(1)
    return [(first + i, low + math.exp(-i / 200) + rng.random() / 4) for i in range(steps)]


class Picture:
    """A parsed picture: its texts, its curves as lists of (x, y), and its curves mapped back to data."""

    def __init__(self, title="a run", losses=(), validation=(), rates=()):
        self.svg = microgpt.loss_plot(title, list(losses), list(validation), list(rates))
        self.root = ElementTree.fromstring(self.svg.encode())  # fails on what is no XML, or no UTF-8
        texts = self.root.iter(SVG + "text")
        self.texts = [(e.get("class"), float(e.get("x")), float(e.get("y")), e.text) for e in texts]
        self.curves = {
            e.get("class"): [tuple(map(float, pair.split(","))) for pair in e.get("points").split()]
            for e in self.root.iter(SVG + "polyline")
        }

    def of(self, kind):
        return [text for each, _, _, text in self.texts if each == kind]

    def data(self, kind):
        """A curve as (step, value), by way of the tick labels: a line through the first and the last of an axis."""
        def axis(ticks):
            (a, at), (b, bt) = ticks[0], ticks[-1]
            return lambda place: at + (place - a) / (b - a) * (bt - at)

        number = lambda text: float(text.replace(",", ""))
        across = axis([(x, number(t)) for k, x, _, t in self.texts if k == "grid middle"])
        ticks = [(y - 4, number(t)) for k, _, y, t in self.texts if k == "grid end"]
        up = axis([tick for tick in ticks if (tick[0] > 370) == (kind == RATE)])
        return [(across(x), up(y)) for x, y in self.curves[kind]]

    def dots(self, kind):
        found = [e.get("d") for e in self.root.iter(SVG + "path") if e.get("class") == "dots " + kind]
        return [tuple(map(float, pair)) for pair in re.findall(r"M([\d.]+),([\d.]+)h0", found[0])]


class TestPlot(Files):
    def inside(self, picture):
        for kind, points in picture.curves.items():
            for x, y in points:
                self.assertTrue(90 <= x <= 770, (kind, x))
                self.assertTrue(388 <= y <= 460 if kind == RATE else 40 <= y <= 355, (kind, y))
        for kind, x, y, text in picture.texts:
            width = len(text) * (9.1 if "title" in kind else 7.3) * (1 if text.isascii() else 2)
            left = x - width * ("end" in kind) - width / 2 * ("middle" in kind)
            self.assertTrue(-1 <= left and left + width <= 801 and 10 <= y <= 498, (kind, x, y, text))
        for kind in picture.of("grid end") + picture.of("grid middle"):
            self.assertNotIn("nan", kind)

    def test_every_case_is_a_valid_picture(self):
        losses = noisy(1000)
        rates = [(step, 0.01 * (1 - step / 1000)) for step, _ in losses]
        spiky = losses[:500] + [(501, 1e6)] + losses[501:]
        cases = {
            "usual": (losses, losses[99::100], rates),
            "empty": ([], [], []),
            "one": (losses[:1], [], rates[:1]),
            "two": (losses[:2], losses[1:2], rates[:2]),
            "only validation": ([], losses[:1], []),
            "constant": ([(i, 2.0) for i in range(1, 100)], [], []),
            "zero": ([(i, 0.0) for i in range(1, 100)], [(99, 0.0)], [(i, 0.0) for i in range(1, 100)]),
            "nan": (losses + [(1001, math.nan)], [(1001, math.inf)], rates),
            "only nan": ([(1, math.nan)], [(1, math.nan)], []),
            "spike": (spiky, [], rates),
            "resumed": (noisy(11, 50000), [(50010, 2.2)], [(50000 + i, 1e-5) for i in range(11)]),
            "very late": (noisy(11, 50_000_000), [], []),
            "huge": ([(1, 1.7e308)], [], []),
            "nearly constant": ([(i, 2 + i * 1e-9) for i in range(50)], [], []),
        }
        for name, case in cases.items():
            with self.subTest(name):
                picture = Picture(name, *case)
                self.inside(picture)
                self.assertLess(len(picture.svg.encode()), 200_000)
                self.assertNotRegex(picture.svg, r'(points|d|x|y)="[^"]*(nan|inf)')
                self.assertNotRegex(picture.svg, r"<script|href|url\(|@import")
                self.assertIn("step", picture.of("middle"))
                for label in (RAW, RATE):
                    self.assertIn(label, picture.of(label))
                self.assertEqual(VALIDATION in picture.curves, any(abs(y) < 1e99 for _, y in case[1]))

    def test_numbers_are_where_they_should_be(self):
        losses, rates = noisy(200, 300), [(300 + i, 3e-4 * (i + 1) / 200) for i in range(200)]
        picture = Picture("t", losses, losses[19::20], rates)
        for kind, points, error in ((RAW, losses, 0.005), (VALIDATION, losses[19::20], 0.005), (RATE, rates, 2e-6)):
            drawn = picture.data(kind)
            self.assertEqual(len(drawn), len(points))
            for (step, value), (x, y) in zip(points, drawn):
                self.assertAlmostEqual(x, step, delta=0.1)
                self.assertAlmostEqual(y, value, delta=error)
        self.assertEqual(picture.dots(VALIDATION), picture.curves[VALIDATION])

    def test_mean(self):
        self.assertEqual(microgpt.smooth([(i, 7.0) for i in range(300)], 9), [(i, 7.0) for i in range(300)])
        line = microgpt.smooth([(i, float(i)) for i in range(600)], 1e9)
        self.assertEqual(line[10:590], [(i, i) for i in range(10, 590)])  # it lags nowhere
        self.assertEqual((line[0][1], line[-1][1]), (5, 594))
        self.assertEqual(microgpt.smooth([(1, 2.0), (2, 3.0)], 9), [(1, 2.0), (2, 3.0)])
        spiky = [(i, 1e6 if i == 300 else 2.0) for i in range(600)]
        self.assertLess(max(y for _, y in microgpt.smooth(spiky, 4.0)), 2.2)
        wild = lambda curve: sum(abs(b[1] - a[1]) for a, b in zip(curve, curve[1:]))
        self.assertLess(wild(microgpt.smooth(noisy(1000), 9)), wild(noisy(1000)) / 5)

    def test_round_ticks(self):
        rng = random.Random(2)
        for _ in range(3000):
            low = rng.choice((0, rng.uniform(0, 10), 10 ** rng.uniform(-9, 9)))
            high = low + 10 ** rng.uniform(-9, 9) + low * 1e-6
            number = rng.uniform(2.57, 11)
            ticks = microgpt.round_ticks(low, high, number)
            self.assertTrue(1 < len(ticks) + (low > 0) and len(ticks) <= number + 1, (low, high, number, ticks))
            self.assertTrue(all(low <= tick * (1 + 1e-12) and tick <= high * (1 + 1e-12) for tick in ticks))
            gap = (high - low) if len(ticks) < 2 else (ticks[-1] - ticks[0]) / (len(ticks) - 1)
            if len(ticks) > 1:
                digit = float(f"{gap:.3e}".split("e")[0])
                self.assertIn(digit, (1, 2, 5), (low, high, ticks))
        self.assertEqual(microgpt.round_ticks(0, 1, 7, 1), [0, 1])
        self.assertEqual(microgpt.round_ticks(0, 1000, 7, 1), [0, 200, 400, 600, 800, 1000])

    def test_tick_labels_are_round_and_different(self):
        for first, count in ((1, 1), (1, 2), (1, 7), (50000, 11), (1, 1000), (1, 12345)):
            steps = Picture("t", noisy(count, first)).of("grid middle")
            self.assertEqual(len(set(steps)), len(steps))
            self.assertTrue(steps and all(re.fullmatch(r"\d{1,3}(,\d{3})*", step) for step in steps), steps)
        nearly = Picture("t", [(i, 2 + i * 1e-9) for i in range(900)]).of("grid end")[:-2]
        self.assertEqual(len(set(nearly)), len(nearly))

    def test_limits(self):
        self.assertEqual(microgpt.limits([]), (0, 1))
        self.assertEqual(microgpt.limits([0]), (0, 1))
        self.assertEqual(microgpt.limits([0, 40]), (0, 41))
        low, high = microgpt.limits([2.0])
        self.assertTrue(low < 2 < high)
        self.assertEqual(round(microgpt.limits([2, 2 + 1e-12])[0], 6), 1.8)  # ticks so near could not be told apart

    def test_spikes_are_kept_however_many_steps(self):
        for steps in (2000, 100_000):
            losses = noisy(steps)
            losses[777], losses[1500] = (778, 5.9), (1501, 0.4)
            drawn = Picture("t", losses).data(RAW)
            self.assertTrue(any(abs(y - 5.9) < 0.02 and abs(x - 778) < steps / 3000 for x, y in drawn))
            self.assertTrue(any(abs(y - 0.4) < 0.02 and abs(x - 1501) < steps / 3000 for x, y in drawn))
            self.assertLessEqual(len(drawn), 2001)
            self.assertEqual(drawn, sorted(drawn, key=lambda point: point[0]))

    def test_thin(self):
        few = noisy(1000)[:999]
        self.assertEqual(microgpt.thin(few), few)
        many = [(i, float(i % 37)) for i in range(12345)]
        self.assertLessEqual(len(microgpt.thin(many)), 2000)
        self.assertLessEqual(set(microgpt.thin(many)), set(many))
        thinned = microgpt.thin(many)
        for start in range(0, 12345, 13):
            part = [y for _, y in many[start : start + 13]]
            kept = [y for i, y in thinned if start <= i < start + 13]
            self.assertEqual((min(part), max(part)), (min(kept), max(kept)))

    def test_a_giant_spike_leaves_the_rest_readable(self):
        for place in (0, 1, 500, 998, 999):
            losses = noisy(1000)
            losses[place] = (place + 1, 1e6)
            picture = Picture("t", losses)
            drawn = picture.data(RAW)
            self.assertLess(max(y for _, y in drawn), 10)
            x = picture.curves[RAW][place][0]
            self.assertEqual(picture.curves[RAW][place][1], min(y for _, y in picture.curves[RAW]))  # at the top
            self.assertEqual(picture.of("mark end"), [f"training loss 1e+06 at step {place + 1:,}"])
            marks = [e.get("d") for e in picture.root.iter(SVG + "path") if e.get("class") == "mark end"]
            self.assertTrue(marks[0].startswith(f"M{x:.1f},"), marks)

    def test_no_note_for_a_usual_run(self):
        by_heart = [(i, 10.8 * math.exp(-i / 40) + 0.01) for i in range(1, 3001)]
        for losses in (noisy(1000), by_heart, noisy(1)):
            picture = Picture("t", losses, [(3000, 12.0)])
            self.assertEqual(picture.of("mark end"), [])
            self.assertAlmostEqual(picture.data(VALIDATION)[0][1], 12, delta=0.1)
            self.assertEqual(Picture("t", losses).of("mark end"), [])

    def test_what_is_not_finite_is_marked(self):
        for value in (math.nan, math.inf):
            losses = noisy(300) + [(301, value)]
            picture = Picture("t", losses, [(100, 2.5), (200, value), (300, 2.4)])
            expected = [f"training loss {value} at step 301", f"validation loss {value} at step 200"]
            self.assertEqual(picture.of("mark end"), expected)
            self.assertEqual(len(picture.curves[RAW]), 300)
            self.assertEqual(len(picture.curves[VALIDATION]), 2)
            rows = [y for kind, _, y, _ in picture.texts if kind == "mark end"]
            self.assertGreaterEqual(abs(rows[0] - rows[1]), 14)  # they do not overlap

    def test_titles(self):
        for title in ("", " \n", "x" * 10_000, "word " * 3000, "\u6a21" * 300, "W" * 84, "a-b" * 200):
            picture = Picture(title, noisy(30))
            self.inside(picture)
            self.assertLessEqual(len(picture.of("middle title")), 3)
        self.assertEqual(Picture("1 < 2 & <b>'\"]]>").of("middle title"), ["1 < 2 & <b>'\"]]>"])
        wild = "a\x00b\x01\ud800\udfffc\ufffe\uffff\x7f\x1bd\te\nf\x85g \U0001f600\U0010ffff"
        self.assertEqual(Picture(wild).of("middle title"), ["abcd e f g \U0001f600"])
        self.assertEqual(" ".join(Picture("word " * 30).of("middle title")), "word " * 29 + "word")
        for code in [*range(0x300), *range(0xD7F0, 0xE010), *range(0xFFF0, 0x10010)]:
            ElementTree.fromstring(microgpt.loss_plot("x" + chr(code), [], [], []).encode())

    def test_both_colour_schemes(self):
        style = Picture().root.find(SVG + "style").text
        self.assertIn("prefers-color-scheme: dark", style)

    def test_a_hundred_thousand_steps(self):
        losses = [(i, 2.0 + (i * 7919 % 1000) / 1000) for i in range(1, 100_001)]
        rates = [(i, 0.01) for i in range(1, 100_001)]
        start = time.perf_counter()
        picture = Picture("t", losses, losses[::100], rates)
        self.assertLess(time.perf_counter() - start, 3)  # 0.2 on a quiet machine
        self.assertLess(len(picture.svg), 200_000)
        self.inside(picture)
        self.assertLess(len(Picture("t", losses, losses, rates).svg), 200_000)

    def of_run(self, status, errors, *flags):
        """The picture that a run of the command line leaves."""
        self.file("input.txt", "emma\nolivia\nava\n")
        path = os.path.join(self.folder.name, "run.svg")
        done = self.run_script(*flags, "--samples", "0", "--plot", path)
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertRegex(done.stderr, errors)
        self.assertFalse(os.path.exists(path + microgpt.PART))
        with open(path, encoding="utf-8") as file:
            return ElementTree.fromstring(file.read()), done

    def test_the_command_line_draws_its_losses(self):
        flags = ["--steps", "30", "--lr", "0.02", "--val-fraction", "0.4", "--eval-every", "7", "--div-warn", "1e9"]
        root, done = self.of_run(0, "^$", *flags)
        curves = {e.get("class"): e.get("points").split() for e in root.iter(SVG + "polyline")}
        self.assertEqual({k: len(v) for k, v in curves.items()}, {RAW: 30, MEAN: 30, VALIDATION: 5, RATE: 30})
        losses = [float(loss) for loss in re.findall(r"loss (\S+)\r", done.stdout)]
        heights = [float(place.split(",")[1]) for place in curves[RAW]]
        self.assertEqual(len(losses), 30)
        for a, y in zip(losses, heights):
            self.assertTrue(all(y > z - 0.2 for b, z in zip(losses, heights) if b > a))  # a lower loss, a lower place
        self.assertGreater(max(heights) - min(heights), 50)
        title = next(e.text for e in root.iter(SVG + "text") if "title" in e.get("class"))
        self.assertTrue(title.startswith("microgpt --steps=30 --lr=0.02 --val-fraction=0.4"), title)

    def test_a_run_that_ends_early_is_drawn_too(self):
        root, _ = self.of_run(1, "^microgpt: error: the loss of step", "--optimizer", "sgd", "--lr", "1e300")
        self.assertTrue(any("training loss" in (e.text or "") for e in root.iter(SVG + "text")))

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_an_interrupted_run_is_drawn(self):
        self.file("input.txt", "emma\nolivia\nava\n")
        command = [sys.executable, SCRIPT, "--steps", "1000000", "--plot", "run.svg"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=self.folder.name) as process:
            process.stdout.read(5000)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        self.assertEqual((process.returncode, errors.count(b"\n")), (130, 1))
        ElementTree.parse(os.path.join(self.folder.name, "run.svg"))

    def test_a_plot_or_a_trace_never_takes_the_place_of_something_else(self):
        path = self.file("names.txt", "emma\n")
        for name in ("--plot", "--trace"):
            self.assertRefused(2, "of its own", "--corpus", path, name, path)
        self.assertRefused(1, "cannot save", "--corpus", path, "--plot", "nowhere/a.svg")
        path = self.file("names.jsonl", "emma\n")
        self.assertRefused(2, "of its own", "--corpus", path, "--trace", path)
        self.assertRefused(2, "of its own", "--corpus", path, "--plot", "a.svg", "--save", "a.svg")
        self.run_script("--corpus", path, "--steps", "1", "--samples", "0", "--save", "b.svg")
        self.assertRefused(2, "of its own", "--resume", "b.svg", "--save", "c", "--plot", "b.svg")
        if hasattr(os, "symlink"):
            os.symlink(path, os.path.join(self.folder.name, "link.jsonl"))
        for corpus, trace in ((path, "./names.jsonl"), ("*.jsonl", "names.jsonl"), ("link.jsonl", "names.jsonl")):
            self.assertRefused(2, "of its own", "--corpus", corpus, "--trace", trace)
        self.assertRefused(2, "of its own", "--corpus", path, "--save", "new.jsonl", "--trace", "./new.jsonl")
        os.mkdir(os.path.join(self.folder.name, "folder.svg"))
        self.assertRefused(2, "of its own", "--corpus", path, "--plot", "folder.svg")
        for name in ("--save", "--plot", "--trace"):
            self.assertRefused(2, "of its own", "--corpus", path, name, "")
        other = self.file("d.svg.part", "precious")
        self.assertEqual(self.run_script("--corpus", path, "--steps", "1", "--plot", "d.svg").returncode, 0)
        with open(other, encoding="utf-8") as file:
            self.assertEqual(file.read(), "precious")

    def test_a_learning_rate_of_next_to_nothing_is_drawn(self):
        for rate in (1e-323, 1e-200, 1e-90):
            self.inside(Picture("t", noisy(9), [], [(i, rate) for i in range(1, 10)]))

    def test_numbers_are_short(self):
        picture = Picture("t", noisy(1000), noisy(1000)[::50], [(i, 1 / 3 / i) for i in range(1, 1001)])
        for e in picture.root.iter(SVG + "polyline"):
            self.assertRegex(e.get("points"), r"^(\d+\.\d,\d+\.\d ?)+$")

    def test_the_plotted_rates_are_those_of_the_steps(self):
        path, seen = self.file("a.txt", "emma\nolivia\nava\n"), []
        args, _ = microgpt.parse_args(["--corpus", path, "--steps", "4", "--lr", "0.4", "--plot", path + ".svg"])
        draw = lambda title, losses, validation, rates: str(seen.extend(rates))
        with unittest.mock.patch("sys.stdout", io.StringIO()), unittest.mock.patch("microgpt.loss_plot", draw):
            microgpt.Run(args, None, unittest.mock.Mock(caught=0)).train()
        self.assertEqual([step for step, _ in seen], [1, 2, 3, 4])
        self.assertClose([[rate for _, rate in seen]], [[0.4, 0.3, 0.2, 0.1]])


class TestTrace(Files):
    def setUp(self):
        super().setUp()
        self.file("input.txt", "emma\nolivia\nava\nbo\n")
        self.path = os.path.join(self.folder.name, "run.jsonl")

    def lines(self):
        with open(self.path, encoding="utf-8") as file:
            return list(map(json.loads, file))

    def test_its_numbers_are_those_of_the_run(self):
        flags = ["--steps", "12", "--batch-size", "3", "--warmup-steps", "4", "--seed", "7", "--samples", "0"]
        done = self.run_script(*flags, "--trace", self.path)
        lines = self.lines()
        self.assertEqual((done.returncode, done.stderr, len(lines)), (0, "", 12))
        printed = re.findall(r"step +(\d+) / +12 \| loss (\S+)", done.stdout)
        self.assertEqual(printed, [(str(line["step"]), f"{line['loss']:.4f}") for line in lines])
        docs = microgpt.read_documents([os.path.join(self.folder.name, "input.txt")])
        random.Random(7).shuffle(docs)
        seen = 0
        for step, line in enumerate(lines):
            self.assertEqual(line["documents"], [docs[(3 * step + i) % 4] for i in range(3)])
            self.assertEqual([len(tokens) for tokens in line["tokens"]], [len(doc) + 2 for doc in line["documents"]])
            seen += sum(len(doc) + 1 for doc in line["documents"])
            self.assertEqual(line["tokens_so_far"], seen)
            rate = 0.01 * ((step + 1) / 4 if step < 4 else 1 - (step - 4) / 8)
            self.assertAlmostEqual(line["learning_rate"], rate, 15)

    def test_the_gradients_are_those_of_the_first_step(self):
        self.run_script("--steps", "2", "--samples", "0", "--save", "init.safetensors", "--steps", "0")
        tensors, _ = microgpt.read_safetensors(os.path.join(self.folder.name, "init.safetensors"))
        self.run_script("--steps", "2", "--samples", "0", "--trace", self.path, "--clip-grad", "0.1")
        first, second = self.lines()
        config = Config(len(set("emmaoliviaavabo")) + 1)
        weights = {name: tensors[name] for name in microgpt.shapes(config)}
        loss, grads = microgpt.loss_and_grads(Scalar, config, weights, first["tokens"])
        self.assertAlmostEqual(first["loss"], loss, 12)
        self.assertEqual(list(first["gradient_squares"]), list(grads))
        for name, rows in grads.items():
            self.assertAlmostEqual(first["gradient_squares"][name], sum(g * g for g in flat(rows)), 12)
        self.assertAlmostEqual(first["gradient_norm"] ** 2, sum(g * g for g in flat(grads)), 12)
        self.assertNotIn("gradient_squares", second)

    def test_a_resumed_run_goes_on_with_the_file(self):
        flags = ["--samples", "0", "--schedule", "constant", "--trace"]
        self.run_script("--steps", "9", *flags, "whole.jsonl")
        self.run_script("--steps", "4", *flags, self.path, "--save", "a.safetensors")
        self.run_script("--resume", "a.safetensors", "--steps", "9", *flags, self.path)
        with open(os.path.join(self.folder.name, "whole.jsonl"), encoding="utf-8") as file:
            self.assertEqual(self.lines(), list(map(json.loads, file)))

    def test_each_line_is_there_when_its_step_is_done(self):
        class Training:
            def __iter__(_):
                for step in range(3):
                    yield step, 1.0 + step, {"w": [[3.0, 4.0]]}, [[0, 1]]
                    self.assertEqual([line["loss"] for line in self.lines()], [1.0, 2.0, 3.0][: step + 1])

        state = microgpt.State(None, CharTokenizer(["a"]), {}, {}, {}, None)
        self.assertEqual(len(list(microgpt.traced(Training(), self.path, state, lambda step: 0.1))), 3)
        self.assertEqual(self.lines()[0]["gradient_norm"], 5.0)

    @unittest.skipIf(os.name == "nt", "needs resource limits")
    def test_a_full_disk_ends_the_run_and_keeps_its_checkpoint(self):
        code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        code += "resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))\n"
        code += f"sys.path.insert(0, {HERE!r}); import microgpt; sys.exit(microgpt.main())"
        flags = "--schedule", "constant", "--batch-size", "99", "--samples", "0", "--save"
        more = "a.safetensors", "--trace", self.path, "--steps", "1000000"
        done = self.run_script(*flags, *more, script=self.file("driver.py", code))
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertRegex(done.stderr, r"^microgpt: error: cannot write .*run.jsonl: File too large; step \d+ is saved in a")
        self.run_script(*flags, "b.safetensors", "--steps", re.search(r"step (\d+) is saved", done.stderr).group(1))
        first, second = [load(os.path.join(self.folder.name, name))[0] for name in ("a.safetensors", "b.safetensors")]
        self.assertEqual(first.step, second.step)
        self.assertTrue((first.weights, first.m) == (second.weights, second.m))


# 17. The command line -------------------------------------------------------------------------------------


class TestCommandLine(Files):
    def peak_kilobytes(self, *flags):
        """The most memory that a run of its own held."""
        code = "import sys, resource, subprocess; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        command = [sys.executable, "-c", code, sys.executable, SCRIPT, *flags]
        return int(subprocess.run(command, cwd=self.folder.name, stdout=subprocess.PIPE, check=True).stdout)

    @needs_names
    def test_the_default_run_prints_what_the_reference_prints(self):
        with open(NAMES, encoding="utf-8") as file:
            self.file("input.txt", file.read())
        done = self.run_script()
        lines = done.stdout.split("\n")
        self.assertEqual(lines[:3], ["num docs: 32033", "vocab size: 27", "num params: 4192"])
        steps = lines[3].split("\r")
        self.assertEqual((len(steps), steps[-1]), (1001, ""))
        losses = {1: 3.3660, 2: 3.4243, 3: 3.1778, 998: 2.4764, 999: 2.4730, 1000: 2.6497}
        for i, loss in losses.items():
            self.assertEqual(steps[i - 1], f"step {i:4d} / 1000 | loss {loss:.4f}")
        names = """kamon ann karai jaire vialan karia yeran anna areli kaina konna keylen liole alerin earan lenne
                   kana lara alela anton""".split()
        samples = [f"sample {i:2d}: {name}" for i, name in enumerate(names, 1)]
        self.assertEqual(lines[4:], ["--- inference (new, hallucinated names) ---", *samples, ""])
        self.assertEqual((done.stderr, done.returncode), ("", 0))
        if sys.platform == "linux" and sys.implementation.name == "cpython":
            self.assertLess(self.peak_kilobytes("--steps", "100"), 40_000)
        golden = os.path.join(os.path.dirname(NAMES), "golden", "default_run.txt")
        with open(golden, encoding="utf-8") as file:
            self.assertEqual(done.stdout.replace("\r", "\n").split(), file.read().split())

    def test_the_shipped_names_are_found_from_anywhere(self):
        done = self.run_script("--steps", "1", "--samples", "1")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"^num docs: \d{4,}\nvocab size: 27\n")

    def test_input_txt_of_the_current_folder_comes_first(self):
        self.file("input.txt", "aa\nab\n")
        self.assertIn("num docs: 2\nvocab size: 3\n", self.run_script("--steps", "1", "--samples", "0").stdout)

    def test_the_engines_and_archs_print_the_same(self):
        self.file("input.txt", "emma\nolivia\nava\n")
        for arch in ("microgpt", "gpt2"):
            flags = (
                "--steps 5 --batch-size 2 --layers 2 --d-model 8 --heads 2 --context 5 --top-k 3 --samples 3 --arch"
            )
            runs = [self.run_script(*flags.split(), arch, "--engine", e).stdout for e in ("scalar", "tensor")]
            self.assertEqual(*runs)

    def test_both_spellings_of_a_flag(self):
        for flags in (["--d-model", "8", "--context", "4"], ["--n-embd", "8", "--block-size", "4"]):
            args, _ = microgpt.parse_args(flags)
            self.assertEqual((args.d_model, args.context), (8, 4))
        self.assertEqual(microgpt.parse_args(["--cosine", "--vulkan"])[0].schedule, "cosine")
        self.assertEqual(microgpt.parse_args(["--cosine", "--vulkan"])[0].engine, "vulkan")

    def test_a_seed_gives_the_same_run_and_another_seed_another(self):
        runs = [self.run_script("--steps", "2", "--samples", "2", "--seed", seed).stdout for seed in "112"]
        self.assertEqual(runs[0], runs[1])
        self.assertNotEqual(runs[1], runs[2])

    def test_a_prompt_begins_each_sample(self):
        done = self.run_script(
            "--steps", "1", "--samples", "2", "--prompt", "em", "--max-tokens", "3", "--temperature", "0"
        )
        samples = done.stdout.split("\n")[-3:-1]
        self.assertRegex(samples[0], "^sample  1: em[a-z]{0,3}$")
        self.assertEqual(samples[0][11:], samples[1][11:])

    def test_a_stream(self):
        self.file("book.txt", "one two three\n\nfour five six\n" * 9)
        flags = "--corpus book.txt --stream --steps 3 --context 8 --samples 1 --max-tokens 40".split()
        done = self.run_script(*flags)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("--- inference (new, hallucinated text) ---\nsample  1: ", done.stdout)
        self.assertEqual(self.run_script(*flags).stdout, done.stdout)

    def losses(self, *flags):
        """The losses that a run prints, whatever else it prints."""
        done = self.run_script("--samples", "0", *flags)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return re.findall(r"loss (\S+)\r", done.stdout), done.stdout

    def test_training_with_all_that_people_use(self):
        with open(os.path.join(HERE, "input.txt"), encoding="utf-8") as file:
            self.file("input.txt", file.read(8000))
        flags = """--vocab-size 100 --arch gpt2 --layers 2 --d-model 16 --context 16 --batch-size 2 --optimizer adamw --cosine
                   --warmup-steps 5 --clip-grad 1 --val-fraction 0.1 --steps 60 --eval-every 20 --lr 0.02"""
        losses, out = self.losses(*flags.split())
        self.assertEqual(len(losses), 60)
        validation = [float(a) for a in re.findall(r"validation (\S+)\n", out)]
        self.assertEqual(len(validation), 3)
        self.assertLess(validation[-1], float(losses[0]) - 0.3)
        self.assertLess(statistics.mean(map(float, losses[-10:])), float(losses[0]) - 0.3)

    def test_the_long_command_line_of_the_design(self):
        os.mkdir(os.path.join(self.folder.name, "corpus"))
        with open(os.path.join(HERE, "input.txt"), encoding="utf-8") as file:
            self.file(os.path.join("corpus", "a.txt"), file.read(2000))
        flags = (
            """--stream --steps 50000 --vocab-size 1000 --warmup-steps 500 --cosine --div-crit 50 --gen-every 500"""
        )
        parsed = microgpt.parse_args(["--corpus", "corpus/*.txt", *flags.split()])[0]
        self.assertEqual((parsed.steps, parsed.vocab_size, parsed.schedule), (50000, 1000, "cosine"))
        self.assertEqual((parsed.val_fraction, parsed.div_crit, parsed.clip_grad), (0.1, 50.0, None))
        flags = flags.replace("50000", "6").replace("500", "3").replace("--div-crit 50", "--div-crit 5000")
        done = self.run_script("--corpus", "corpus/*.txt", *flags.split(), "--samples", "1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("sample at step 3: ", done.stdout)
        self.assertRegex(done.stderr, "^microgpt: note: after [0-9]+ merges no pair of tokens occurs twice\n")

    def test_watching_does_not_disturb_the_run(self):
        plain, _ = self.losses("--steps", "12")
        watched, out = self.losses("--steps", "12", "--gen-every", "5")
        self.assertEqual(watched, plain)
        self.assertEqual(out.count("sample at step"), 2)
        flags = "--steps", "12", "--val-fraction", "0.2", "--stream"
        self.assertEqual(self.losses(*flags, "--eval-every", "3")[0], self.losses(*flags, "--eval-every", "12")[0])

    def test_held_out_documents_are_never_trained_on(self):
        self.file("input.txt", "\n".join("abcdefghij"))
        corpus = os.path.join(self.folder.name, "input.txt")
        args, _ = microgpt.parse_args(["--val-fraction", "0.3", "--corpus", corpus])
        docs, held_out = microgpt.load_corpus(args, random.Random(1))
        self.assertEqual((len(docs), len(held_out), sorted(docs + held_out)), (7, 3, list("abcdefghij")))
        args.stream = True
        docs, held_out = microgpt.load_corpus(args, random.Random(1))
        self.assertEqual((docs, held_out), (["a\nb\nc\nd\ne\nf\ng"], ["\nh\ni\nj"]))

    def test_validation_is_the_mean_over_all_held_out_tokens(self):
        config, weights = model()
        tokenizer = CharTokenizer(["abcdefghij"])
        bos, batch = tokenizer.bos, microgpt.held_out_batch(tokenizer, ["abc", "j", "hij"], False, 8)
        self.assertEqual(batch, [[bos, 0, 1, 2, bos], [bos, 9, bos], [bos, 7, 8, 9, bos]])
        loss = microgpt.mean_loss(Tensor, config, weights, batch)
        self.assertAlmostEqual(loss, microgpt.loss_and_grads(Tensor, config, weights, batch)[0], 12)
        self.assertEqual(
            microgpt.held_out_batch(tokenizer, ["abcdefghi"], True, 4), [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
        )
        self.assertEqual(len(microgpt.held_out_batch(tokenizer, ["abc"] * 1000, False, 8)), 125)

    def test_divergence_warns_and_stops(self):
        flags = "--steps 60 --eval-every 20 --val-fraction 0.1 --samples 0 --lr 0.05".split()
        self.file("input.txt", "a" * 900 + "bc" * 60)
        done = self.run_script("--stream", *flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(
            done.stderr, "^microgpt: warning: at step 20 the validation loss is [0-9]+ % above the training"
        )
        self.assertEqual(self.run_script("--stream", "--div-warn", "1e30", *flags).stderr, "")
        self.assertRefused(1, "at step 20 the validation loss is", "--stream", "--div-crit", "50", *flags)

    def test_flags_that_do_not_go_together(self):
        self.assertRefused(2, "--warmup-steps 9 is longer than the run", "--steps", "5", "--warmup-steps", "9")
        self.assertRefused(2, "--warmup-steps", "--warmup-steps", "-1")
        self.assertRefused(2, "--val-fraction", "--val-fraction", "1")
        self.file("input.txt", "abc")
        self.assertRefused(1, "too small to hold a part of it out", "--val-fraction", "0.1")
        self.assertEqual(microgpt.parse_args(["--clip-grad", "1", "--no-clip-grad"])[0].clip_grad, None)

    def test_progress_is_shown_on_a_terminal_and_nowhere_else(self):
        try:
            import pty
        except ImportError:
            self.skipTest("needs a pseudo-terminal")
        terminal, end = pty.openpty()
        done = subprocess.run(
            [sys.executable, SCRIPT, "--steps", "400", "--samples", "0"],
            cwd=self.folder.name,
            stdout=subprocess.PIPE,
            stderr=end,
        )
        os.close(end)
        shown = os.read(terminal, 10000).decode()
        os.close(terminal)
        self.assertRegex(shown, r"\d steps/s, \d+ tokens/s, 0:\d\d left")
        self.assertNotIn(b"steps/s", done.stdout)

    def test_ctrl_c_on_a_terminal_says_that_the_step_will_end(self):
        try:
            import pty
        except ImportError:
            self.skipTest("needs a pseudo-terminal")
        terminal, end = pty.openpty()
        command = [sys.executable, SCRIPT, "--steps", "1000000"]
        with subprocess.Popen(command, cwd=self.folder.name, stdout=subprocess.PIPE, stderr=end) as process:
            process.stdout.read(5000)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        os.close(end)
        shown = os.read(terminal, 100_000).decode().splitlines()
        os.close(terminal)
        self.assertEqual(shown[-3], "microgpt: finishing this step; a second time ends at once")
        self.assertEqual(shown[-1], "microgpt: interrupted: nothing was saved")

    def test_help_names_every_group(self):
        done = self.run_script("--help")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for group in ("data:", "model:", "training:", "watching:", "keeping:", "sampling:", "engine:"):
            self.assertIn("\n" + group + "\n", done.stdout)
        self.assertIn("so many % above training (20)", " ".join(done.stdout.split()))
        self.assertNotRegex(done.stdout, "object at")

    def test_main_writes_to_whatever_stdout_is(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(microgpt.main(["--steps", "1", "--samples", "1"]), 0)
        self.assertIn("sample  1: ", out.getvalue())

    def test_importing_runs_nothing(self):
        done = subprocess.run(
            [sys.executable, "-c", "import microgpt"], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_a_corpus_that_cannot_be_learned_from(self):
        self.file("empty.txt", "")
        self.file("blank.txt", "\n  \n\r\n\t\n")
        self.file("latin.txt", b"caf\xe9\n")
        self.file("short.txt", "ab")
        self.assertRefused(1, "cannot read missing.txt", "--corpus", "missing.txt")
        self.assertRefused(1, r"cannot read nothing-\*.txt", "--corpus", "nothing-*.txt")
        self.assertRefused(1, "no text in empty.txt", "--corpus", "empty.txt")
        self.assertRefused(1, "no text in empty.txt", "--corpus", "empty.txt", "--stream")
        self.assertRefused(1, "no text in blank.txt", "--corpus", "blank.txt")
        self.assertRefused(1, "latin.txt is not UTF-8", "--corpus", "latin.txt")
        self.assertRefused(1, "cannot read ", "--corpus", self.folder.name)
        self.assertRefused(1, "too short for a context of 16", "--corpus", "short.txt", "--stream")

    @unittest.skipIf(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, "root may read everything")
    def test_a_file_that_may_not_be_read(self):
        os.chmod(self.file("secret.txt", "a"), 0)
        self.assertRefused(1, "cannot read secret.txt", "--corpus", "secret.txt")

    def test_a_wrong_command_line(self):
        self.assertRefused(2, "--heads 3 does not divide --d-model 16", "--heads", "3")
        self.assertRefused(2, "unrecognized arguments: --nonsense", "--nonsense")
        self.assertRefused(2, "unrecognized arguments: --temp", "--temp", "1")
        for flag in "--layers --d-model --heads --context --batch-size --max-tokens".split():
            for value in ("0", "-1", "x", "1.5", ""):
                self.assertRefused(2, f"{flag}.*whole number from 1", flag + "=" + value)
        for flag in "--lr --temperature".split():
            for value in ("-1", "nan", "inf", "x"):
                self.assertRefused(2, f"{flag}.*number from 0", flag + "=" + value)
        self.assertRefused(2, "--beta1.*below 1", "--beta1", "1")
        self.assertRefused(2, "--eps", "--eps", "0")
        self.assertRefused(2, "--arch.*invalid choice", "--arch", "gpt5")

    def test_a_prompt_with_unknown_characters_is_refused_before_training(self):
        done = self.assertRefused(1, "the character 'É'", "--prompt", "É")
        self.assertNotIn("step", done.stdout)

    def test_a_loss_that_is_no_number_ends_the_run(self):
        self.assertRefused(1, "the loss of step [23] is nan|inf", "--lr", "1e300")

    def test_weights_that_overflow_in_the_last_step_are_noticed(self):
        self.assertRefused(1, "overflowed", "--lr", "1e308", "--steps", "1")

    def test_a_closed_pipe_ends_it_quietly(self):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--steps", "100000"],
            cwd=self.folder.name,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.read(10)
        process.stdout.close()
        self.assertEqual((process.stderr.read(), process.wait(30)), (b"", 1))
        process.stderr.close()

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_behind_the_output_is_one_line(self):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        for unbuffered in ({}, {"PYTHONUNBUFFERED": "1"}):
            settings = {"cwd": self.folder.name, "env": {**environment, **unbuffered}}
            command = [sys.executable, SCRIPT, "--steps", "1"]
            with open("/dev/full", "w") as full:
                done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, **settings)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, b"^microgpt: error: cannot write the output: [^\n]*\n$")
                done = subprocess.run([*command, "--nonsense"], stdout=subprocess.PIPE, stderr=full, **settings)
                self.assertEqual((done.returncode, done.stdout), (2, b""))
            reader, writer = os.pipe()
            os.close(reader)
            for flags in (["--help"], ["--prompt", "9"]):
                done = subprocess.run([*command, *flags], stdout=writer, stderr=subprocess.PIPE, **settings)
                self.assertIn((done.returncode, done.stderr), ((0, b""), (1, b"")), flags)
            os.close(writer)

    def test_odd_arguments_are_still_one_line(self):
        self.assertRefused(1, "cannot read no such", "--corpus", "no\nsuch")
        self.assertRefused(2, "unrecognized arguments: --a b", "--a\nb")
        self.assertRefused(2, "more than a billion weights", "--d-model", "99999", "--heads", "1")
        self.assertRefused(2, "--steps", "--steps", "9" * 400)

    def test_text_that_the_terminal_cannot_show(self):
        self.file("input.txt", "é😀\n")
        done = self.run_script("--steps", "1", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_without_any_text_and_without_a_network_one_line_says_what_to_do(self):
        with open(SCRIPT, encoding="utf-8") as file:
            source = file.read().replace(microgpt.NAMES, "http://127.0.0.1:9/names.txt")
        path = self.file("microgpt.py", source)
        done = self.run_script(script=path)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
        self.assertRegex(done.stderr, "^microgpt: error: there is no input.txt.*--corpus")
        self.assertEqual(os.listdir(self.folder.name), ["microgpt.py"])

    def test_the_names_are_fetched_whole_where_there_are_none(self):
        names = "".join(f"{a}{b}\n" for a in "abcdefgh" for b in "abcdefgh")
        source = self.file("served.txt", names)
        self.assertEqual(
            microgpt.download("file://" + source, os.path.join(self.folder.name, "input.txt")),
            os.path.join(self.folder.name, "input.txt"),
        )
        self.assertEqual(sorted(os.listdir(self.folder.name)), ["input.txt", "served.txt"])
        with open(os.path.join(self.folder.name, "input.txt"), encoding="utf-8") as file:
            self.assertEqual(file.read(), names)

    def test_vulkan_hands_the_products_back(self):
        fake = lambda: ("matmul", "matmuls")
        with unittest.mock.patch("microgpt.gpu_products", fake):
            try:
                microgpt.use_engine("vulkan")
                self.assertEqual(microgpt.matmul, "matmul")
            finally:
                microgpt.use_engine("tensor")
        self.assertIs(microgpt.matmul, microgpt.plain_matmul)
        self.assertIs(microgpt.matmuls, microgpt.plain_matmuls)

    def test_a_gpu_that_is_lost_leaves_a_checkpoint(self):
        driver = self.file(
            "driver.py",
            f"import sys, types\nsys.path.insert(0, {HERE!r})\nimport microgpt, vulkan_gemm\ncalls = iter(range(200))\n"
            "def offload(gpu, matmul, matmuls):\n    def lost(*args, **settings):\n        if next(calls, None) is None:\n"
            "            raise vulkan_gemm.VulkanError('the device is lost')\n        return matmul(*args, **settings)\n"
            "    return lost, matmuls\nvulkan_gemm.offload = offload\n"
            "vulkan_gemm.VulkanGemm = lambda: types.SimpleNamespace(close=lambda: None)\nsys.exit(microgpt.main())\n",
        )
        done = self.run_script("--vulkan", "--save", "a.safetensors", script=driver)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        line = r"^microgpt: error: the GPU cannot go on: the device is lost; step (\d+) is saved in a.safetensors\n$"
        self.assertRegex(done.stderr, line)
        state, _ = load(os.path.join(self.folder.name, "a.safetensors"))
        self.assertEqual(str(state.step), re.match(line, done.stderr).group(1))

    def test_what_the_flags_say_reaches_the_training(self):
        corpus, seen = self.file("input.txt", "emma\nolivia\nava\n"), []

        def optimizer(weights, grads, m, v, step, lr, **settings):
            seen.append((lr, settings, math.hypot(*flat(grads))))

        flags = "--beta1 0.5 --beta2 0.6 --eps 0.1 --weight-decay 0.2 --lr 0.3 --schedule constant --clip-grad 0.01"
        args, state = microgpt.parse_args(["--corpus", corpus, "--steps", "1", *flags.split()])
        output = unittest.mock.patch("sys.stdout", io.StringIO())
        with unittest.mock.patch.dict(microgpt.OPTIMIZERS, adam=optimizer), output:
            microgpt.Run(args, state, unittest.mock.Mock(caught=0)).train()
        ((lr, settings, norm),) = seen
        self.assertEqual((lr, settings), (0.3, {"beta1": 0.5, "beta2": 0.6, "eps": 0.1, "weight_decay": 0.2}))
        self.assertAlmostEqual(norm, 0.01, 12)

    def test_the_loss_beside_a_validation_is_the_mean_since_the_one_before(self):
        flags = "--steps 7 --eval-every 3 --val-fraction 0.1 --div-warn 1e9"
        losses, out = self.losses(*flags.split())
        losses = list(map(float, losses))
        told = list(map(float, re.findall(r"loss (\S+) on average", out)))
        self.assertEqual(len(told), 3)
        for mean, part in zip(told, (losses[:3], losses[3:6], losses[6:])):
            self.assertAlmostEqual(mean, statistics.mean(part), delta=1.01e-4)

    def test_a_run_validates_on_what_it_does_not_train_on(self):
        path = self.file("a.txt", "\n".join("abcdefghij"))
        args, _ = microgpt.parse_args(["--corpus", path, "--val-fraction", "0.3"])
        with unittest.mock.patch("sys.stdout", io.StringIO()):
            run = microgpt.Run(args, None, None)
        held_out = list(map(run.state.tokenizer.decode, run.held_out))
        self.assertEqual((len(held_out), sorted(run.docs + held_out)), (3, list("abcdefghij")))

    def test_the_gap_that_warns_and_the_gap_that_stops(self):
        for flags, held_out, expected in (
            ("", 2.38, (False, False)),
            ("", 2.42, (True, False)),
            ("--div-warn 50", 2.98, (False, False)),
            ("--div-warn 50", 3.02, (True, False)),
            ("--div-warn 0", 2.02, (True, False)),
            ("--div-crit 50", 2.98, (True, False)),
            ("--div-crit 50", 3.02, (False, True)),
            ("--div-crit 0 --div-warn 0", 1.98, (False, False)),
        ):
            args, stopped = microgpt.parse_args(flags.split())[0], False
            out, errors = io.StringIO(), io.StringIO()
            with unittest.mock.patch("sys.stdout", out), unittest.mock.patch("sys.stderr", errors):
                try:
                    microgpt.judge(args, 7, 2.0, held_out)
                except microgpt.Halt:
                    stopped = True
            self.assertEqual(("warning" in errors.getvalue(), stopped), expected, (flags, held_out))

    def test_samples_on_the_way_leave_the_last_samples_as_they_were(self):
        flags = "--steps", "6", "--samples", "3"
        runs = [self.run_script(*flags, *more).stdout for more in ([], ["--gen-every", "2"])]
        self.assertEqual(*(out[out.index("--- inference") :] for out in runs))

    def test_top_k_and_temperature_reach_the_samples(self):
        self.file("input.txt", "emma\nolivia\nava\nnoah\nliam\n")

        def samples(*flags):
            out = self.run_script("--steps", "1", "--samples", "4", *flags).stdout
            return re.findall("^sample +[0-9]+: (.*)$", out, re.M)

        self.assertEqual(len(set(samples("--top-k", "1"))), 1)
        self.assertEqual(len(set(samples("--temperature", "0"))), 1)
        self.assertNotEqual(samples("--temperature", "2"), samples())

    def test_what_a_sample_goes_on_from(self):
        path = self.file("a.txt", "\tb\na\n")
        for flags, prompt in (
            ("", [2]),
            ("--prompt b", [2, 1]),
            ("--stream", [1]),
            ("--stream --prompt b", [3]),
        ):
            args, _ = microgpt.parse_args(["--corpus", path, *flags.split()])
            with unittest.mock.patch("sys.stdout", io.StringIO()):
                self.assertEqual(microgpt.Run(args, None, None).prompt, prompt, flags)


class TestAutotune(Files):
    FLAGS = ["--autotune", "--steps", "1", "--samples", "1", "--batch-sizes", "1,2", "--worker-counts", "1,2"]

    def setUp(self):
        super().setUp()
        self.file("it's input.txt", "emma\nolivia\nava\n")
        self.flags = ["--corpus", "it's input.txt", "--prompt", 'a"', *self.FLAGS]
        self.file("it's input.txt", 'emma\nolivia\nava"\n')

    def tune(self, *flags, limit=2.0):
        """What a short --autotune prints: the rows of its table, and the last line."""
        code = f"import sys; sys.path.insert(0, {HERE!r}); import microgpt; sys.argv[0] = {SCRIPT!r}\n"
        code += f"microgpt.autotune.__defaults__ = ({limit},)\nif __name__ == '__main__': sys.exit(microgpt.main())"
        start = time.monotonic()
        done = self.run_script(*self.flags, *flags, script=self.file("driver.py", code))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertLess(time.monotonic() - start, limit + 25)  # it should be 1 more; machines may be busy
        *_, table = done.stdout.partition("tokens/s\n")
        *rows, command = table.splitlines()
        return {tuple(row.split()[:3]): float(row.split()[3]) for row in rows}, command

    def engines(self):
        return ["tensor"] if NO_VULKAN else ["tensor", "vulkan"]

    def test_it_tries_every_choice_and_ends_with_the_fastest_as_a_command(self):
        speeds, command = self.tune()
        choices = [(engine, *rest) for engine in self.engines() for rest in (("1", "1"), ("2", "1"), ("2", "2"))]
        self.assertEqual(list(speeds), choices)
        engine, batch_size, workers = max(speeds, key=speeds.get)
        self.assertEqual("--engine=vulkan" in command, engine == "vulkan")
        self.assertEqual("--batch-size=2" in command, batch_size == "2")
        self.assertEqual("--workers=2" in command, workers == "2")
        self.assertNotIn("autotune", command)

    @unittest.skipIf(os.name == "nt", "needs a POSIX shell")
    def test_the_last_line_runs_as_pasted(self):
        _, command = self.tune("--worker-counts", "1", limit=0.5)
        done = subprocess.run(command, shell=True, cwd=self.folder.name, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertRegex(done.stdout, rb'step    1 /    1 .*\n.*\nsample  1: a"')

    def test_it_measures_tokens_a_second_and_changes_no_weight(self):
        args, _ = microgpt.parse_args(["--batch-size", "3"])
        config, weights = model()
        state = microgpt.State(config, None, weights, microgpt.zeros(weights), microgpt.zeros(weights), None)
        before, slept = json.dumps(weights), 0.02

        def batches(size):
            return lambda step: time.sleep(slept) or [[1, 2, 3, 4]] * size

        speed = microgpt.training_speed(args, state, batches, ("tensor", 4, 1), 0.3)
        self.assertEqual(json.dumps(weights), before)
        self.assertTrue(12 / slept / 10 < speed < 12 / slept, speed)

    @unittest.skipIf(os.name == "nt", "needs POSIX signals")
    def test_when_interrupted_it_prints_what_it_knows(self):
        command = [sys.executable, SCRIPT, *self.flags, "--batch-sizes", "1,2,3,4,5,6,7,8,9"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=self.folder.name, stdout=pipe, stderr=pipe) as process:
            time.sleep(3)
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 130)
        self.assertRegex(errors, rb"microgpt: interrupted: nothing was saved\n$")
        rows = out.decode().partition("tokens/s\n")[2].splitlines()
        self.assertTrue(2 <= len(rows) < 18, rows)
        self.assertRegex(rows[-1], "microgpt.py.* --steps=1")

    def test_a_saved_run_is_tuned_with_the_flags_that_replace_its_own(self):
        flags = self.flags[:2], "--steps 1 --samples 0 --batch-size 2 --optimizer sgd --save a.safetensors".split()
        self.assertEqual(self.run_script(*chain(*flags)).returncode, 0)
        more = "--resume a.safetensors --optimizer adam --batch-sizes 1 --worker-counts 1".split()
        _, command = self.tune(*more, limit=0.5)
        self.assertLess(
            {"--optimizer=adam", "--batch-size=1", "--workers=1", "--resume=a.safetensors"}, set(shlex.split(command))
        )

    def test_wrong_choices_are_one_line(self):
        for wrong in ("0", "a", "1,,2", "", "1.5", "-1", "1 2"):
            self.assertRefused(2, "--batch-sizes", "--autotune", f"--batch-sizes={wrong}")
        self.assertRefused(2, "nothing to try", *self.flags, "--batch-sizes=1,2", "--worker-counts=4")


# README ---------------------------------------------------------------------------------------------------


def readme_commands():
    """Each command of the README as a list of words, and the lines that it shows below it."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", file.read().replace("\\\n", ""), re.M | re.S)
    for _, block in blocks:
        start = "$ python " if block.startswith("$") else "python "
        for part in block[len(start) :].split("\n" + start) if block.startswith(start) else ():
            command, _, shown = part.partition("\n")
            yield shlex.split(command, comments=True)[1:], shown.splitlines()


EXERCISES = {  # number -> edits of the source, flags
    1: ([], ["--heads 1", "--heads 1 --steps 4000 --eval-every 4000", "--steps 4000 --eval-every 4000"]),
    2: (
        [
            ('x = engine.add(x, linear(h, layer + "attn_wo"))', 'x = linear(h, layer + "attn_wo")'),
            ('x = engine.add(x, linear(h, layer + "mlp_fc2"))', 'x = linear(h, layer + "mlp_fc2")'),
        ],
        ["", "--layers 4"],
    ),
    3: (
        [
            (
                'x = engine.add(engine.embed(w["wte"], chain(*docs)), engine.embed(w["wpe"], positions))',
                'x = engine.embed(w["wte"], chain(*docs))',
            )
        ],
        ["", "--steps 4000 --eval-every 4000"],
    ),
    4: ([], ["--temperature 0.1", "--temperature 2"]),
    5: ([], ["--optimizer sgd", "--optimizer sgd --lr 0.3", "--optimizer sgd --lr 1"]),
    6: ([], ["--corpus microgpt.py --stream --context 64 --batch-size 4"]),
    7: ([], ["--val-fraction 0.99 --eval-every 4000 --steps 4000"]),
    8: ([("rng.shuffle(docs)", "docs.sort()")], [""]),
    9: ([("rng.gauss(0, 0.08)", "rng.gauss(0, 0.0)")], [""]),
    10: ([("softmax(scores[:seen]) + [0.0] * (len(scores) - seen)", "softmax(scores)")], [""]),
}


# Each mistake of the porting section, in its order: what of part one is replaced, and by what.
MISTAKES = [
    ("zip(logs, logits, targets)) / len(targets)", "zip(logs, logits, targets))"),
    ("encode(doc[:block_size]), bos]", "encode(doc[:block_size])]"),
    ('engine.rmsnorm(x) if config.arch == "microgpt" else x', "x"),
    ("[sum(map(mul, q[t][head], key[head])) / size**0.5", "[sum(map(mul, q[t][head], key[head]))"),
    ("(sum(a * a for a in row) / len(row) + 1e-5)", "(sum(a * a for a in row) / len(row))"),
    ("short / (1 - beta1 ** (step + 1)), eps * short", "1, eps"),
    ("float(self.data > 0)", "1.0"),
    ("eps = lr * short / (1 - beta1 ** (step + 1)), eps * short", "eps = lr * short / (1 - beta1 ** (step + 1)), eps"),
    ("rate_at(step), **settings)", "rate_at(step + 1), **settings)"),
    ("lr, beta1=0.85, beta2", "lr, beta1=0.9, beta2"),
    ("beta1=0.85, beta2=0.99, eps", "beta1=0.85, beta2=0.999, eps"),
    (
        "        optimizer(weights, grads, m,",
        "        total = grads if step == first else "
        "{name: [list(map(plus, *both)) for both in zip(total[name], rows)] for name, rows in grads.items()}\n"
        "        optimizer(weights, total, m,",
    ),
]


class TestReadme(Files):
    def setUp(self):
        super().setUp()
        for name in ("microgpt.py", "vulkan_gemm.py", "input.txt"):
            shutil.copy(os.path.join(HERE, name), self.folder.name)
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            self.readme = file.read()

    def section(self, title):
        return self.readme.split(f"\n## {title}\n")[1].split("\n## ")[0]

    def run_command(self, flags, *more):
        """What a command prints, in lines."""
        done = self.run_script(*flags, *more, script=os.path.join(self.folder.name, "microgpt.py"))
        return done.returncode, (done.stdout + done.stderr).replace("\r", "\n").splitlines()

    def edited(self, edits):
        """Put the edits of an exercise into the copy of microgpt.py."""
        with open(SCRIPT, encoding="utf-8") as file:
            source = file.read()
        for old, new in edits:
            self.assertEqual(source.count(old), 1, old)
            source = source.replace(old, new)
        self.file("microgpt.py", source)

    def test_every_command_runs(self):
        commands = list(readme_commands())
        self.assertGreater(len(commands), 12)
        for i, (flags, _) in enumerate(commands, 2):
            if "--autotune" not in flags:
                short = ["--warmup-steps", "0"] * ("--warmup-steps" in flags)
                short += ["--steps", str(i if "--resume" in flags else 2), "--samples", "1"]
                status, lines = self.run_command(flags, *short)
                self.assertEqual(status, 0, (flags, lines[-1:]))

    def test_the_flags_are_those_that_there_are(self):
        table = self.section("Flags").split("\n\n")[0]
        flags = {flag for action in microgpt.make_parser()._actions for flag in action.option_strings}
        self.assertEqual(set(re.findall(r"--[a-z][a-z0-9-]+", table)), flags - {"-h", "--help"})

    def test_the_numbers_for_porting_are_those_of_the_shipped_names(self):
        flags = ["--explain", "emma", "--samples", "5", "--trace", "run.jsonl"]
        status, lines = self.run_command(flags)
        self.assertEqual(status, 0)
        for line in self.section("What you see").split("```\n")[1].splitlines():
            self.assertIn(line, lines)
        explained = next(shown for flags, shown in readme_commands() if "--explain" in flags)
        self.assertEqual(explained, lines[-len(explained) :])
        with open(os.path.join(self.folder.name, "run.jsonl"), encoding="utf-8") as file:
            trace = list(map(json.loads, file))
        rows = re.findall(r"^\| (\d+) \| (\w+) \| (\S+) \| (\S+) \|$", self.section("Porting"), re.M)
        self.assertEqual([int(row[0]) for row in rows], [*range(1, 11), 1000])
        for step, name, loss, norm in rows:
            line = trace[int(step) - 1]
            self.assertEqual([name], line["documents"])
            self.assertAlmostEqual(line["loss"], float(loss), 11)
            self.assertAlmostEqual(line["gradient_norm"], float(norm), 10)
        a, b = Value(2.0), Value(-3.0)
        y = (a * b + a**2).tanh() / b
        microgpt.backward(y)
        docs = microgpt.read_documents([os.path.join(HERE, "input.txt")])
        rng = random.Random(42)
        rng.shuffle(docs)
        config = Config(CharTokenizer(docs).vocab_size)
        first = flat(logits(Tensor, config, microgpt.initial_weights(config, rng), [26]))
        wanted = [y.data, a.grad, b.grad, *first[:3], sum(first), trace[0]["loss"], trace[0]["gradient_norm"]]
        wanted += trace[0]["gradient_squares"].values()
        table = self.section("Porting").split("|---|---|\n")[1].split("\n\n")[0]
        told = list(map(float, re.findall(r"-?\d+\.\d{6,}(?:e-\d+)?", table)))
        self.assertEqual(len(told), len(wanted))
        for a, b in zip(told, wanted):
            self.assertAlmostEqual(a / b, 1, 9)
        samples = [line.split(": ")[1] for line in lines if line.startswith("sample")]
        self.assertIn("{}, {}, {}, {} and {}".format(*samples), self.section("Porting").replace("\n", " "))

    def test_a_mistake_in_a_port_shows_as_it_is_told(self):
        table = re.findall(r"^\| (\d) \| (\d+\.\d+) \| [^|]+ \|$", self.section("Porting"), re.M)
        self.assertEqual(len(table), len(MISTAKES))
        with open(SCRIPT, encoding="utf-8") as file:
            source = file.read()
        right = self.first_losses(source)
        for (step, told), (old, new) in zip(table, MISTAKES):
            self.assertEqual(source.count(old), 1, old)
            losses = self.first_losses(source.replace(old, new))
            self.assertEqual(f"{losses[int(step) - 1]:.{len(told.partition('.')[2])}f}", told, new)
            self.assertEqual([a == b for a, b in zip(losses, right)].index(False), int(step) - 1)

    def first_losses(self, source):
        """The losses of three steps of the default run, by part one of such a microgpt.py."""
        port = types.ModuleType("port")
        exec(source, vars(port))
        docs, rng = port.read_documents([os.path.join(HERE, "input.txt")]), random.Random(42)
        rng.shuffle(docs)
        tokenizer = port.CharTokenizer(docs)
        config = port.Config(tokenizer.vocab_size)
        weights = port.initial_weights(config, rng)
        batch_at = port.document_batches(docs, tokenizer.encode, tokenizer.bos, config.block_size, 1)
        compute, rate_at = partial(port.loss_and_grads, port.Scalar, config), lambda step: 0.01 * (1 - step / 1000)
        training = port.train(compute, weights, port.zeros(weights), port.zeros(weights), batch_at, 3, rate_at)
        return [loss for _, loss, _, _ in training]

    def test_the_exercises_fit_the_source(self):
        items = re.split(r"^\d+\. ", self.section("Exercises"), flags=re.M)[1:]
        self.assertEqual(len(items), len(EXERCISES))
        for item, (edits, runs) in zip(items, EXERCISES.values()):
            self.edited(edits)
            told = " ".join(item.split())
            for _, new in edits:
                self.assertIn(new, told)
            flags = [*runs[-1].split(), "--steps", "2", "--val-fraction", "0.5", "--samples", "1", "--batch-size", "1"]
            self.assertEqual(self.run_command(flags)[0], 0, item)

    def check_everything(self):
        """Run every command and every exercise in full, and print what the README does not say."""
        self.timeout, numbers = 1200, " ".join(self.section("Exercises").split())
        for flags, shown in readme_commands():
            if "--autotune" in flags or "--help" in flags:
                continue
            lines = list(map(str.rstrip, self.run_command(flags)[1]))
            print("microgpt.py", *flags, "-- as it says" if all(line in lines for line in shown) else "-- OTHER:")
            for line in shown:
                print(end=f"  {line}\n" * (line not in lines))
        for number, (edits, runs) in EXERCISES.items():
            self.edited(edits)
            for run in runs:
                flags = ["--val-fraction", "0.1", "--eval-every", "1000", "--samples", "5", *run.split()]
                pattern = r"validation (\d\S+)$|" + (r"^sample  \d: (.*)" if number == 4 else r"loss of (step \d+)")
                for line in self.run_command(flags)[1]:
                    for text in filter(None, chain(*re.findall(pattern, line))):
                        print(number, run, text, "-- as it says" if text in numbers else "-- OTHER")


# The benchmark --------------------------------------------------------------------------------------------
#
# Each row times a thing and another in turn, some rounds long, and gives the medians and the median of the ratios.

MEDIUM = {"n_layer": 2, "n_embd": 64, "block_size": 64}


def seconds(work, times=1):
    """Seconds that a call takes, on average over so many."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def step(steps=1, engine="tensor", workers=1, batch_size=1, stream=False, **sizes):
    """A function that times a training step of the default model, or of one with other sizes: some at a time."""
    docs = microgpt.read_documents([NAMES if os.path.exists(NAMES) else os.path.join(HERE, "input.txt")], stream)
    rng, tokenizer = random.Random(42), CharTokenizer(docs)
    rng.shuffle(docs)
    config = Config(tokenizer.vocab_size, **sizes)
    weights = microgpt.initial_weights(config, rng)
    if stream:
        batch_at = microgpt.stream_batches(docs[0], tokenizer.encode, config.block_size, batch_size, 42)
    else:
        batch_at = microgpt.document_batches(docs, tokenizer.encode, tokenizer.bos, config.block_size, batch_size)
    compute = microgpt.Workers(workers, engine, config) if workers > 1 else None

    def run(n=steps):
        used = microgpt.use_engine(engine)
        train(used, config, weights, batch_at, n, 1000, compute=compute)
        microgpt.use_engine("tensor")

    run(1)  # processes start, a GPU is measured
    return lambda: seconds(run) / steps


def yardstick():
    """A function that times a step of the reference, an average one of its first."""
    def run(steps):
        command = [sys.executable, YARDSTICK, NAMES, str(steps), "1000"]
        return seconds(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))

    return lambda: (run(21) - run(1)) / 20


def token(engine, documents):
    """A function that times a token that the default model samples."""
    config = Config(27)
    weights = microgpt.initial_weights(config, random.Random(1))
    make = lambda: list(microgpt.sample(engine, config, weights, [0], config.block_size))
    return lambda: seconds(make, documents) / config.block_size


def merges(learn):
    """A function that times the learning of 500 merges of 200 kB."""
    with open(SCRIPT, encoding="utf-8") as file:
        docs, new = characters([(file.read() * 4)[:200_000]])
    return lambda: seconds(lambda: learn(docs[:], 500, new))


def saving():
    """A function that times a checkpoint of the model of the rows on workers."""
    config, tokenizer = Config(27, **MEDIUM), CharTokenizer(["abcdefghijklmnopqrstuvwxyz"])
    weights = microgpt.initial_weights(config, random.Random(1))
    moments = microgpt.zeros(weights)
    state = microgpt.State(config, tokenizer, weights, moments, moments, random.Random(1))

    def save():
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: state.save(os.path.join(folder, "a.safetensors"), []))

    return save


BENCHMARKS = [  # what, against what, rounds, and what makes the two functions that time them
    ("a step", "the reference", 5, lambda: (step(300), yardstick())),
    ("a step, `--engine scalar`", "the reference", 5, lambda: (step(20, "scalar"), yardstick())),
    ("a sampled token", "`--engine scalar`", 5, lambda: (token(Tensor, 60), token(Scalar, 6))),
    (
        "a step of 8 windows of 64, 2 layers of 64, `--workers 2`",
        "one process",
        5,
        lambda: [step(2, workers=n, batch_size=8, stream=True, **MEDIUM) for n in (2, 1)],
    ),
    (
        "the same in one process with layers of 128, `--vulkan`",
        "plain Python",
        3,
        lambda: [step(1, name, 1, 8, True, **{**MEDIUM, "n_embd": 128}) for name in ("vulkan", "tensor")],
    ),
    ("500 merges of 200 kB", "a recount for each", 3, lambda: (merges(microgpt.learn_merges), merges(recount))),
    ("a checkpoint of 2 layers of 64", "a step", 5, lambda: (saving(), step(1, "tensor", 1, 8, True, **MEDIUM))),
]


def benchmark(rows):
    """Print what things cost, as a table: all rows, or those with these numbers."""
    gc.disable()  # as the command line does
    print(f"{sys.implementation.name} {sys.version.split()[0]}, {os.cpu_count()} cores\n")
    print("| row | what | ms | against | ms | ratio |\n|---|---|---|---|---|---|")
    for i, (what, against, rounds, prepare) in enumerate(BENCHMARKS, 1):
        if rows and str(i) not in rows:
            continue
        missing = "no yardstick" if against == "the reference" and not os.path.exists(YARDSTICK) else ""
        missing = missing or (NO_VULKAN if "--vulkan" in what else "")
        if missing:
            print(f"| {i} | {what} | left out: {missing} | | | |")
            continue
        timers = prepare()
        times = [[timer() for timer in timers] for _ in range(rounds)]
        ratio = statistics.median(b / a for a, b in times)
        numbers = [statistics.median(column) * 1e3 for column in zip(*times)]
        ours, theirs, ratio = (f"{x:.{2 * (x < 10) or int(x < 100)}f}" for x in [*numbers, ratio])
        print(f"| {i} | {what} | {ours} | {against} | {theirs} | {ratio} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["benchmark"]:
        benchmark(sys.argv[2:])
    elif sys.argv[1:] == ["readme"]:
        unittest.TextTestRunner().run(TestReadme("check_everything"))
    else:
        unittest.main()
