#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tests and the benchmark of microgpt, in the order of the file's sections.

    python test_microgpt.py              run all tests
    python test_microgpt.py benchmark    print what things cost on this machine
    python test_microgpt.py readme       run everything that the README shows, as it stands there

Gradients are held against finite differences, the engines against each other, and the command line is run as a
person runs it. Two things from outside the repository are used if they lie in ../shared: the reference's names and
what it prints on them, and the yardstick, which costs what the reference costs.
"""

import contextlib
import ctypes
import gc
import io
import itertools
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
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import product
from operator import mul

import microgpt
import vulkan_gemm
from microgpt import CharTokenizer, Config, FastTensor, Matrix, Tensor, UserError, Value

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "microgpt.py")
README = os.path.join(HERE, "README.md")
NAMES = os.path.join(HERE, "..", "shared", "names.txt")
GOLDEN = os.path.join(HERE, "..", "shared", "golden", "default_run.txt")
YARDSTICK = os.path.join(HERE, "..", "shared", "yardstick", "reference_cost.py")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
needs_posix = unittest.skipUnless(hasattr(os, "fork"), "needs POSIX signals and limits")
ENGINES = Matrix, Tensor, FastTensor


def normal(rng, rows, columns):
    """A matrix of normally distributed numbers."""
    return [[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]


def flat(rows):
    """All numbers of a matrix, or of a dictionary of matrices, in one list."""
    rows = [row for matrix in rows.values() for row in matrix] if isinstance(rows, dict) else rows
    return [a for row in rows for a in row]


class Test(unittest.TestCase):
    """A TestCase that compares matrices, finds the tape empty, and leaves it empty."""

    def setUp(self):
        microgpt.tape.clear()  # of a test that failed
        microgpt.gpu_matmuls.cache_clear()
        closing = types.SimpleNamespace(register=self.addCleanup)  # a GPU is closed after its test
        patch = unittest.mock.patch.object(microgpt, "atexit", closing)
        patch.start()
        self.addCleanup(patch.stop)

    def tearDown(self):
        self.assertEqual(len(microgpt.tape), 0)

    def assertClose(self, got, wanted, tolerance=1e-9):
        """The same shape, and every number within a tolerance relative to the largest of them."""
        self.assertEqual(list(map(len, got)), list(map(len, wanted)))
        got, wanted = flat(got), flat(wanted)
        scale = max([1e-3, *map(abs, wanted)])
        for i, (a, b) in enumerate(zip(got, wanted)):
            self.assertLessEqual(abs(a - b), tolerance * scale, f"number {i}: {a} is not {b}")


class Files(Test):
    """A test in a folder of its own."""

    timeout = 120  # seconds that a process may take

    def setUp(self):
        super().setUp()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder.name)

    def file(self, name, content):
        path = os.path.join(self.folder.name, name)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return path

    def content(self, name):
        with open(os.path.join(self.folder.name, name), "rb") as file:
            return file.read()

    def main(self, *flags, out=None):
        """Run the command line in this process. Returns its status, standard output and standard error."""
        out, errors = out or io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")  # by threads of other tests
            status = microgpt.main(list(flags))
        return status, out.getvalue(), errors.getvalue()

    def run_script(self, *flags, env=None, script=SCRIPT, **options):
        """Run microgpt.py as a process in the test's folder; its output as text, carriage returns kept."""
        env = {**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        command = [sys.executable, script, *flags]
        done = subprocess.run(command, cwd=self.folder.name, env=env, timeout=self.timeout, **pipes)
        done.stdout = (done.stdout or b"").decode().replace(os.linesep, "\n")
        done.stderr = done.stderr.decode().replace(os.linesep, "\n")
        return done

    def driver(self, code):
        """A script that does something before or after it can import microgpt and vulkan_gemm."""
        start = f"import os, sys\nsys.path.insert(0, {os.path.dirname(SCRIPT)!r})\nimport microgpt, vulkan_gemm\n"
        return self.file("driver.py", start + code)

    def assertRefused(self, status, pattern, *flags):
        """The run ends with this status and one line that matches, before its first step."""
        got, out, errors = self.main(*flags)
        self.assertEqual((got, errors.count("\n"), "step" in out), (status, 1, False), errors)
        self.assertRegex(errors, r"^microgpt: error: .*(" + pattern + ")")


# 1. Dataset -----------------------------------------------------------------------------------------------


class TestDataset(Files):
    def test_documents_are_the_stripped_lines_without_blank_ones(self):
        content = "\ufeffanna\r\n\r\n  bob b \n\t\n\nzoë"  # it begins with a byte-order mark
        path = self.file("a.txt", content)
        self.assertEqual(microgpt.read_documents(path), ["anna", "bob b", "zoë"])

    def test_only_line_ends_part_documents(self):
        path = self.file("a.txt", "a\x0bb\u2028c\x85d\ne")
        self.assertEqual(microgpt.read_documents(path), ["a\x0bb\u2028c\x85d", "e"])

    def test_input_txt_holds_names(self):
        path = os.path.join(HERE, "input.txt")
        docs = microgpt.read_documents(path)
        self.assertGreaterEqual(len(docs), 5000)
        self.assertEqual(len(set(docs)), len(docs))
        for name in docs:
            self.assertRegex(name, "^[a-z]{2,15}$")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), "".join(name + "\n" for name in docs).encode())


# 2. Characters --------------------------------------------------------------------------------------------


class TestCharTokenizer(Test):
    def test_ids_are_the_sorted_characters_then_bos(self):
        tokenizer = CharTokenizer(["zyxwvutsrqponm", "abcdefghijkl", "emma"])
        self.assertEqual([tokenizer.bos, *tokenizer.encode("emma"), tokenizer.bos], [26, 4, 12, 12, 0, 26])
        self.assertEqual(tokenizer.vocab_size, 27)

    def test_any_text_comes_back_and_bos_has_none(self):
        for text in ("", "anna", "e\u0301e\u0301", "👩‍👩‍👧 🇫🇷", "שלום עולם", "a\nb\tc \0", "\U0010ffff"):
            tokenizer = CharTokenizer([text, "x"])
            ids = tokenizer.encode(text)
            self.assertEqual(tokenizer.decode([tokenizer.bos, *ids, tokenizer.bos]), text)

    def test_an_unknown_character_is_a_key_error(self):
        with self.assertRaisesRegex(KeyError, "é"):
            CharTokenizer(["cafe"]).encode("café")


# 3. Autograd on one number --------------------------------------------------------------------------------


def exp(a):
    return a.exp() if isinstance(a, Value) else math.exp(a)


def log(a):
    return a.log() if isinstance(a, Value) else math.log(a)


def relu(a):
    return a.relu() if isinstance(a, Value) else max(0.0, a)


class TestValue(Test):
    def test_every_operator_against_finite_differences(self):
        one_number = "-a; a + 2; 2 + a; a - 2; 2 - a; a * 3; 3 * a; a / 3; 3 / a; a ** 3; a ** -0.5"
        functions = "exp(a); exp(-a); log(a); relu(a); relu(-a); relu(a - b)"
        both = "a + b; a - b; a * b; a / b; a + a; a * a + a / a - a; (a * b + a) * (a - b) / (a * a + 1)"
        rng, h = random.Random(1), 1e-6
        for source in "; ".join([one_number, functions, both]).split("; "):
            f = eval(f"lambda a, b: {source}")
            for _ in range(5):
                x, y = rng.uniform(0.3, 2), rng.uniform(0.3, 2)
                a, b = Value(x), Value(y)
                with self.subTest(source, a=x, b=y):
                    out = f(a, b)
                    self.assertAlmostEqual(out.data, f(x, y), 12)
                    microgpt.backward(out)
                    self.assertAlmostEqual(a.grad, (f(x + h, y) - f(x - h, y)) / (2 * h), 6)
                    self.assertAlmostEqual(b.grad, (f(x, y + h) - f(x, y - h)) / (2 * h), 6)

    def test_the_example_of_section_3(self):
        a, b = Value(2.0), Value(3.0)
        c = a * b + a
        for _ in range(2):  # the second call finds an empty tape
            microgpt.backward(c)
            self.assertEqual((c.data, a.grad, b.grad, microgpt.tape), (8.0, 4.0, 2.0, []))
        microgpt.backward(a * b)  # and gradients add up
        self.assertEqual((a.grad, b.grad), (7.0, 4.0))

    def test_a_plain_number_makes_no_node(self):
        a = Value(2.0)
        for out in (a + 1, 1 + a, a - 1, 1 - a, a * 2, 2 * a, a / 2, 2 / a, a**2, -a):
            self.assertIn(out, microgpt.tape)
        for node in microgpt.tape:
            for value in node.inputs:
                self.assertTrue(value is a or value in microgpt.tape)
        microgpt.tape.clear()

    def test_a_graph_of_200_000_operations_deep(self):
        x = a = Value(1.0)
        for _ in range(100_000):
            x = x * 1.00001 + 0.0
        microgpt.backward(x)
        self.assertAlmostEqual(a.grad, 1.00001**100_000, 6)


# 4 and 9. The operations, in Values and a matrix at a time -------------------------------------------------


def caches_of_rows(caches, lengths):
    """The caches argument of attention for documents of these lengths."""
    return [cache for cache, n in zip(caches, lengths) for _ in range(n)]


def operations(rng):
    """Name -> (operation, its inputs) on random shapes, down to one row and one channel."""
    t, d, e = (rng.choice([1, 2, 3, 6, 9]) for _ in range(3))
    x, z, w, back = normal(rng, t, d), normal(rng, t, d), normal(rng, e, d), normal(rng, 3, e)
    ids = [rng.randrange(e) for _ in range(t)]
    n_head, size = rng.randint(1, 3), rng.randint(1, 4)
    lengths = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    pasts = [rng.choice([0, 0, 1, 3]) for _ in lengths]
    qkv, past_qkv = ([normal(rng, sum(n), n_head * size) for _ in "qkv"] for n in (lengths, pasts))

    def attention(q, k, v, pasts=()):
        caches = [([], []) for _ in lengths]
        if any(pasts):
            past_q, past_k, past_v = map(type(q).wrap, past_qkv)
            past_q.attention(past_k, past_v, n_head, caches_of_rows(caches, pasts))
            microgpt.tape.clear()  # what a cache holds is constant
        return q.attention(k, v, n_head, caches_of_rows(caches, lengths))

    return {
        "embed": (lambda table: table.embed(ids), [w]),
        "add": (lambda x, z: x + z, [x, z]),
        "add to itself": (lambda x: x + x + x.rmsnorm(), [x]),
        "linear": (lambda x, w: x.linear(w), [x, w]),
        "linear by itself": (lambda x: x.linear(x), [x]),
        "rmsnorm": (lambda x: x.rmsnorm(), [x]),
        "rmsnorm of zeros": (lambda x: x.rmsnorm(), [[[0.0] * d, *x]]),
        "relu": (lambda x: x.relu(), [x]),
        "mlp": (lambda x, w, back: x.linear(w).relu().linear(back), [x, w, back]),
        "attention": (attention, qkv),
        "attention with a past": (lambda q, k, v: attention(q, k, v, pasts), qkv),
        "cross entropy": (lambda x: x, [x]),  # of which all losses are made
        "relu of a relu": (lambda x, w: (x.linear(w).relu() + x.linear(w)).relu(), [x, w]),
    }


def loss_of(engine, f, inputs):
    """Wrap the inputs and apply f. Returns them, the result, and a loss that depends on all of it."""
    microgpt.tape.clear()
    inputs = list(map(engine.wrap, inputs))
    out = f(*inputs)
    head = engine.wrap(normal(random.Random(1), 3, len(out.data[0])))
    return inputs, out, out.linear(head).cross_entropy([t % 3 for t in range(len(out.data))])


def gradients(engine, f, inputs):
    """The numbers of f's result, the loss that is made of them, and the gradients of the inputs."""
    inputs, out, loss = loss_of(engine, f, inputs)
    microgpt.backward(loss)
    return out.data, loss.data, [matrix.grad for matrix in inputs]


class TestOperations(Test):
    def test_every_operation_against_finite_differences(self):
        for seed in range(6):
            for name, (f, inputs) in operations(random.Random(100 + seed)).items():
                for engine in ENGINES:
                    _, _, grads = gradients(engine, f, inputs)
                    rng = random.Random(seed)
                    for matrix, grad in zip(inputs, grads):
                        i, j = rng.randrange(len(matrix)), rng.randrange(len(matrix[0]))
                        with self.subTest(name, engine=engine.__name__, seed=seed, at=(i, j)):
                            slope = self.slope(engine, f, inputs, matrix[i], j)
                            self.assertAlmostEqual(grad[i][j], slope, delta=1e-6 * max(1, abs(slope)))

    def slope(self, engine, f, inputs, row, j, h=1e-6):
        """The derivative of the loss by one number of the inputs."""
        losses, before = [], row[j]
        for row[j] in (before + h, before - h):
            losses.append(loss_of(engine, f, inputs)[2].data)
            microgpt.tape.clear()
        row[j] = before
        return (losses[0] - losses[1]) / (2 * h)

    def test_the_engines_agree_on_every_operation(self):
        for seed in range(30):
            for name, (f, inputs) in operations(random.Random(seed)).items():
                before = [[list(row) for row in rows] for rows in inputs]
                out, loss, grads = gradients(Matrix, f, inputs)
                for engine in (Tensor, FastTensor):
                    with self.subTest(name, engine=engine.__name__, seed=seed):
                        got, got_loss, got_grads = gradients(engine, f, inputs)
                        for a, b in zip([got, [[got_loss]], *got_grads], [out, [[loss]], *grads]):
                            self.assertClose(a, b)
                        self.assertEqual(inputs, before)

    def test_no_position_looks_ahead_or_into_another_document(self):
        rng, lengths = random.Random(3), [2, 4, 3]
        documents = [i for i, n in enumerate(lengths) for _ in range(n)]
        q, k, v = (normal(rng, 9, 4) for _ in "qkv")
        for engine in ENGINES:

            def attention():
                caches = caches_of_rows([([], []) for _ in lengths], lengths)
                out = engine.wrap(q).attention(engine.wrap(k), engine.wrap(v), 2, caches).data
                microgpt.tape.clear()
                return out

            for changed in range(9):
                before = attention()
                k[changed], v[changed] = normal(rng, 2, 4)
                for t, (a, b) in enumerate(zip(before, attention())):
                    sees = t >= changed and documents[t] == documents[changed]
                    self.assertEqual(a != b, sees, f"{engine.__name__}: row {t} when row {changed} changes")

    def test_large_logits_and_scores(self):
        cases = (
            ([1e4, -1e4, 0.0], 0.0, [0.0, 0.0, 0.0]),
            ([-1e4, 1e4, 0.0], 2e4, [-1.0, 1.0, 0.0]),
            ([1e4, 1e4, 1e4], math.log(3), [-2 / 3, 1 / 3, 1 / 3]),
        )
        for engine in ENGINES:
            for logits, wanted, grad in cases:
                x = engine.wrap([logits])
                loss = x.cross_entropy([0])
                self.assertAlmostEqual(loss.data, wanted, 9)
                microgpt.backward(loss)
                self.assertClose(x.grad, [grad])
            for keys, wanted in (([[1e4], [1e4]], [[1.0], [1.5]]), ([[1e4], [-1e4]], [[1.0], [1.0]])):
                q, k, v = map(engine.wrap, ([[1.0], [1.0]], keys, [[1.0], [2.0]]))
                self.assertClose(q.attention(k, v, 1, [([], [])] * 2).data, wanted)
                microgpt.tape.clear()

    def test_relu_is_flat_at_0(self):
        for engine in ENGINES:
            out, _, (grad,) = gradients(engine, lambda x: x.relu(), [[[0.0, -0.0, 1.0, -1.0]]])
            self.assertEqual(out, [[0.0, 0.0, 1.0, 0.0]])
            self.assertEqual([a != 0 for a in grad[0]], [False, False, True, False])


# 5. GPT ---------------------------------------------------------------------------------------------------

DOCS = [[1, 2, 3, 4], [5, 6], [7, 1, 1, 2, 9, 10]]


def model(n_layer=2, n_embd=8, n_head=2, block_size=8, vocab_size=11):
    """A small model with weights large enough to matter, all of them."""
    config = Config(vocab_size, n_layer, n_embd, n_head, block_size)
    shapes = microgpt.shapes(config)
    return config, {name: normal(random.Random(name), *shape) for name, shape in shapes.items()}


def logits(engine, config, weights, *chunks):
    """The logits of one document that is handed over in chunks."""
    w = {name: engine.wrap(rows) for name, rows in weights.items()}
    cache, out = microgpt.new_cache(config), []
    for chunk in chunks:
        positions = range(len(out), len(out) + len(chunk))
        out += microgpt.gpt(config, w, chunk, positions, [cache] * len(chunk)).data
        microgpt.tape.clear()
    return out


class TestGPT(Test):
    def test_weights_are_drawn_in_the_order_of_the_reference(self):
        shapes = {"wte": (5, 4), "wpe": (3, 4), "lm_head": (5, 4)}
        for i in range(2):
            shapes.update({f"layer{i}.attn_w{x}": (4, 4) for x in "qkvo"})
            shapes.update({f"layer{i}.mlp_fc1": (16, 4), f"layer{i}.mlp_fc2": (4, 16)})
        rng = random.Random(42)
        weights = microgpt.initial_weights(Config(5, 2, 4, 2, 3), random.Random(42))
        self.assertEqual(list(weights), list(shapes))
        for name, (rows, columns) in shapes.items():
            drawn = [rng.gauss(0, 0.08) for _ in range(rows * columns)]
            self.assertEqual((len(weights[name]), flat(weights[name])), (rows, drawn))

    def test_the_loss_is_that_of_the_reference(self):
        config = Config(vocab_size=27, n_layer=2)
        weights = microgpt.initial_weights(config, random.Random(42))
        docs = [[26, 4, 12, 12, 0, 26], [26, 0, 21, 0, 26]]
        loss, _ = microgpt.loss_and_grads(config, weights, docs, Tensor)
        self.assertAlmostEqual(loss, 3.140505474484, 11)

    def test_gradients_of_the_whole_model_against_finite_differences(self):
        (config, weights), h, rng = model(), 1e-6, random.Random(2)
        _, grads = microgpt.loss_and_grads(config, weights, DOCS, FastTensor)
        for name, rows in weights.items():
            for _ in range(4):
                i, j = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
                before, losses = rows[i][j], []
                for rows[i][j] in (before + h, before - h):
                    losses.append(microgpt.loss_and_grads(config, weights, DOCS, FastTensor)[0])
                rows[i][j] = before
                self.assertAlmostEqual(grads[name][i][j], (losses[0] - losses[1]) / (2 * h), 6, name)

    def test_the_engines_agree_on_the_loss_and_on_every_gradient(self):
        config, weights = model()
        loss, wanted = microgpt.loss_and_grads(config, weights, DOCS)
        for engine in (Tensor, FastTensor):
            got, grads = microgpt.loss_and_grads(config, weights, DOCS, engine)
            self.assertAlmostEqual(got, loss, 12)
            self.assertEqual(list(grads), list(weights))
            for name in weights:
                self.assertClose(grads[name], wanted[name])

    def test_a_cache_gives_exactly_the_logits_of_one_pass(self):
        (config, weights), tokens = model(), [1, 2, 3, 4, 5, 6, 7, 8]
        for engine in ENGINES:
            whole = logits(engine, config, weights, tokens)
            for chunks in [[token] for token in tokens], (tokens[:3], tokens[3:4], tokens[4:]):
                got = logits(engine, config, weights, *chunks)
                if engine is FastTensor:  # where it leaves out zeros depends on the rows that it gets
                    self.assertClose(got, whole, 1e-12)
                else:
                    self.assertEqual(got, whole)

    def test_a_batch_gives_the_mean_of_all_predictions_of_its_documents(self):
        config, weights = model()
        for engine in ENGINES:
            loss, grads = microgpt.loss_and_grads(config, weights, DOCS, engine)
            alone = [(len(doc) - 1, *microgpt.loss_and_grads(config, weights, [doc], engine)) for doc in DOCS]
            total = sum(n for n, _, _ in alone)
            self.assertAlmostEqual(loss, sum(n * one for n, one, _ in alone) / total, 12)
            for name in weights:
                parts = [[n / total * a for a in flat(g[name])] for n, _, g in alone]
                self.assertClose([list(map(sum, zip(*parts)))], [flat(grads[name])])


# 6. Adam -------------------------------------------------------------------------------------------


class TestAdam(Test):
    def test_both_forms_against_the_formulas_of_the_paper(self):
        for update in (microgpt.adam, microgpt.fast_adam):
            for beta1, beta2, eps, settings in ((0.85, 0.99, 1e-8, ()), (0.9, 0.95, 1e-1, (0.9, 0.95, 1e-1))):
                rng = random.Random(4)
                weights = {"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)}
                m, v = microgpt.zeros(weights), microgpt.zeros(weights)
                theta, m1, v1 = flat(weights), [0.0] * 8, [0.0] * 8
                for t in range(1, 7):
                    grads = {"a": normal(rng, 2, 3), "b": [[0.0, 1e-7]]}
                    update(weights, grads, m, v, t - 1, 0.1 / t, *settings)
                    for i, g in enumerate(flat(grads)):
                        m1[i] = beta1 * m1[i] + (1 - beta1) * g
                        v1[i] = beta2 * v1[i] + (1 - beta2) * g**2
                        m_hat, v_hat = m1[i] / (1 - beta1**t), v1[i] / (1 - beta2**t)
                        theta[i] -= 0.1 / t * m_hat / (math.sqrt(v_hat) + eps)
                    with self.subTest(update.__name__, settings=settings, t=t):
                        for got, wanted in ((weights, theta), (m, m1), (v, v1)):
                            self.assertClose([flat(got)], [wanted], 1e-12)


# 7 and 8. Training and sampling ---------------------------------------------------------------------------


def train(config, weights, docs, tokenizer, steps, engine, update, lr=0.01):
    """Train as the default run does, and return the losses."""
    m, v, losses = microgpt.zeros(weights), microgpt.zeros(weights), []
    for step in range(steps):
        tokens = [tokenizer.bos, *tokenizer.encode(docs[step % len(docs)]), tokenizer.bos]
        loss, grads = microgpt.loss_and_grads(config, weights, [tokens[: config.block_size + 1]], engine)
        update(weights, grads, m, v, step, lr * (1 - step / steps))
        losses.append(loss)
    return losses


class TestTraining(Files):
    def test_training_lowers_the_loss_with_each_engine(self):
        docs = ["ab", "abab", "ababab"]
        config = Config(vocab_size=3, n_layer=1, n_embd=4, n_head=1, block_size=8)
        for engine in ENGINES:
            weights = microgpt.initial_weights(config, random.Random(1))
            losses = train(config, weights, docs, CharTokenizer(docs), 60, engine, microgpt.adam, 0.05)
            self.assertLess(losses[-1], losses[0] / 2, engine)

    @unittest.skipUnless(os.path.exists(NAMES), "needs the reference's names, ../shared/names.txt")
    @unittest.skipUnless(os.path.exists(GOLDEN), "needs its output, ../shared/golden/default_run.txt")
    def test_part_one_runs_by_itself_and_does_what_the_reference_and_part_two_do(self):
        with open(microgpt.__file__, encoding="utf-8") as file:
            part_one, _ = file.read().split("# " + "=" * 106 + "\n# PART TWO")
        long = self.file("long.txt", "ab" * 12 + "\nb\ncab\n")
        calls = f"train_and_sample({NAMES!r}, steps=10)\ntrain_and_sample({long!r}, 5)\n"
        script = self.file("part_one.py", part_one + calls)
        done = subprocess.run(
            [sys.executable, script], stdout=subprocess.PIPE, universal_newlines=True, timeout=120
        )
        self.assertEqual(done.returncode, 0)
        printed = done.stdout.splitlines()  # text mode makes a line end of the carriage return
        self.assertEqual(printed, self.part_two(NAMES, 10) + self.part_two(long, 5))
        with open(GOLDEN, encoding="utf-8") as file:
            golden = file.read().splitlines()
        # Until the second loss, the learning rate doesn't depend on the number of steps.
        self.assertEqual([line.replace("/   10 |", "/ 1000 |") for line in printed[:5]], golden[:5])

    def part_two(self, path, steps):
        """The lines that train_and_sample prints, computed by the means of part two."""
        rng = random.Random(42)
        docs = microgpt.read_documents(path)
        rng.shuffle(docs)
        tokenizer = CharTokenizer(docs)
        config = Config(tokenizer.vocab_size)
        weights = microgpt.initial_weights(config, rng)
        sizes = {"num docs": len(docs), "vocab size": config.vocab_size, "num params": len(flat(weights))}
        losses = train(config, weights, docs, tokenizer, steps, FastTensor, microgpt.fast_adam)
        samples = [microgpt.sample(config, weights, tokenizer.bos, 0.5, rng) for _ in range(20)]
        return [
            *(f"{what}: {size}" for what, size in sizes.items()),
            *(f"step {i:4d} / {steps:4d} | loss {loss:.4f}" for i, loss in enumerate(losses, 1)),
            "--- inference (new, hallucinated names) ---",
            *(f"sample {i:2d}: {tokenizer.decode(ids)}" for i, ids in enumerate(samples, 1)),
        ]


class TestSampling(Test):
    def test_tokens_come_as_often_as_softmax_says(self):
        config, weights = model(n_layer=1, n_embd=1, n_head=1, block_size=1, vocab_size=4)
        (row,), n, rng = logits(Tensor, config, weights, [3]), 2000, random.Random(6)
        for temperature in (0.5, 1.0, 2.0):
            drawn = [microgpt.sample(config, weights, 3, temperature, rng) or [3] for _ in range(n)]
            exps = [math.exp(a / temperature) for a in row]
            for i, e in enumerate(exps):
                p = e / sum(exps)
                self.assertLess(abs(drawn.count([i]) / n - p), 5 * math.sqrt(p * (1 - p) / n))

    def test_each_token_depends_on_all_before_it(self):
        config, weights = model()
        for bos in range(11):
            tokens = [bos]
            while len(tokens) <= config.block_size and tokens.count(bos) == 1:
                row = logits(Tensor, config, weights, tokens)[-1]
                tokens.append(row.index(max(row)))
            got = microgpt.sample(config, weights, bos, 1e-9, random.Random(1))  # at 1e-9, the likeliest
            self.assertEqual(got, [token for token in tokens if token != bos])

    def test_it_ends_at_bos_and_has_at_most_block_size_tokens(self):
        config, weights = model(n_layer=1, n_embd=1, n_head=1, block_size=3, vocab_size=4)
        weights["lm_head"] = [[0.0]] * 4  # all tokens are equally likely
        rng = random.Random(7)
        samples = [microgpt.sample(config, weights, 3, 1.0, rng) for _ in range(200)]
        self.assertEqual({len(ids) for ids in samples}, {0, 1, 2, 3})
        self.assertEqual(set(flat(samples)), {0, 1, 2})


# 10. Faster products --------------------------------------------------------------------------------------


class TestFastTensor(Test):
    def test_products_of_all_lengths_and_of_mostly_zeros(self):
        rng = random.Random(8)

        def matrix(rows, length, density):
            out = [[a * (rng.random() < density) for a in row] for row in normal(rng, rows, length)]
            if density < 1:
                rng.choice(out)[:] = [0.0] * length
            return out

        for length in (1, 2, 15, 16, 17, 63, 64, 65, 66, 128, 256, 257, 300):
            for densities in product((1, 0.5, 0.2, 0), repeat=2):
                rows, columns = (matrix(rng.choice([1, 2, 5, 9]), length, density) for density in densities)
                wanted = [[math.fsum(map(mul, row, column)) for column in columns] for row in rows]
                with self.subTest(length=length, densities=densities, shape=(len(rows), len(columns))):
                    self.assertClose(FastTensor.matmul(rows, columns), wanted, 1e-12)


# 11. Subwords ---------------------------------------------------------------------------------------------


def recount(docs, n, new):
    """The plain way to learn merges: count all pairs, merge the best, begin again."""
    docs, merges = list(docs), []
    while len(merges) < n:
        counts = Counter(pair for doc in docs for pair in zip(doc, doc[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merged, new = chr(new), new + 1
        merges.append(tuple(map(ord, best)))
        docs = [doc.replace("".join(best), merged) for doc in docs]
    return merges, docs


def characters(docs):
    """Documents as strings of chr(id), and the number of ids."""
    tokenizer = CharTokenizer(docs)
    return ["".join(map(chr, tokenizer.encode(doc))) for doc in docs], len(tokenizer.tokens)


class TestBPE(Test):
    def compare(self, docs, n):
        docs, new = characters(docs)
        self.assertEqual(microgpt.learn_merges(docs, n, new), recount(docs, n, new))

    def test_merges_are_those_of_a_recount_on_random_strings(self):
        for seed in range(190):
            rng = random.Random(seed)
            letters = "abcde"[: rng.randint(1, 5)]
            docs = ["".join(rng.choices(letters, k=rng.randint(0, 50))) for _ in range(rng.randint(1, 4))]
            with self.subTest(seed=seed, docs=docs):
                self.compare([*docs, "x"], rng.randint(0, 25))

    def test_merges_are_those_of_a_recount_on_runs_names_and_prose(self):
        names = microgpt.read_documents(os.path.join(HERE, "input.txt"))[:300]
        with open(SCRIPT, encoding="utf-8") as file:
            prose = file.read(5000)
        cases = [(9, ["a" * 31]), (9, ["aaaabaaab", "aaa", "aabaa"]), (60, names), (80, [prose]),
                 (20, ["abab" * 9, "ba"]), (5, ["", "a", ""]), (0, ["abab"]), (9, ["é😀é😀", "😀é😀é"])]
        for n, docs in cases:
            with self.subTest(docs=docs[:3]):
                self.compare(docs, n)

    def test_ties_go_to_the_smaller_pair_and_no_merge_reaches_across_documents(self):
        for docs, merges, encoded in (
            (["banana"], [(0, 2)], ["\1\3\3\0"]),  # the example of section 11
            (["ab"] * 9 + ["cd"] * 8, [(0, 1), (2, 3)], ["\4"] * 9 + ["\5"] * 8),
        ):
            strings, new = characters(docs)
            self.assertEqual(microgpt.learn_merges(strings, 9, new), (merges, encoded))

    def test_learning_returns_what_encoding_gives(self):
        docs = microgpt.read_documents(os.path.join(HERE, "input.txt"))[:500]
        strings, new = characters(docs)
        merges, encoded = microgpt.learn_merges(strings, 120, new)
        tokenizer = microgpt.BPETokenizer(docs, merges)
        self.assertEqual([list(map(ord, doc)) for doc in encoded], list(map(tokenizer.encode, docs)))
        self.assertEqual((tokenizer.bos, tokenizer.vocab_size), (new + 120, new + 121))

    def test_any_text_of_known_characters_comes_back(self):
        docs = ["the cat and the hat 😀 שלום e\u0301\n\t" * 3]
        strings, new = characters(docs)
        tokenizer, rng = microgpt.BPETokenizer(docs, microgpt.learn_merges(strings, 40, new)[0]), random.Random(8)
        for _ in range(50):
            text = "".join(rng.choices(docs[0], k=rng.randint(0, 60)))
            self.assertEqual(tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.bos]), text)
        with self.assertRaisesRegex(KeyError, "z"):
            tokenizer.encode("the zebra")


# 12. The GPU ----------------------------------------------------------------------------------------------


def count_devices():
    """The number of Vulkan devices here, by bare ctypes: no bug of vulkan_gemm can skip its own tests."""
    try:
        loader = ctypes.CDLL({"win32": "vulkan-1", "darwin": "libvulkan.dylib"}.get(sys.platform, "libvulkan.so.1"))
    except OSError:
        return 0
    info, instance, count = (ctypes.c_uint64 * 8)(1), ctypes.c_void_p(), ctypes.c_uint32()
    if loader.vkCreateInstance(info, None, ctypes.byref(instance)):
        return 0
    loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    loader.vkDestroyInstance(instance, None)
    return count.value


LAYER = "VK_LAYER_KHRONOS_validation"
MANIFESTS = [os.path.join(folder, "vulkan/explicit_layer.d", name + ".json")
             for folder in ("/usr/share", "/usr/local/share", "/etc") for name in (LAYER, "VkLayer_khronos_validation")]
CHECKS = """
khronos_validation.debug_action = VK_DBG_LAYER_ACTION_LOG_MSG
khronos_validation.log_filename = stdout
khronos_validation.report_flags = error,warn,perf
khronos_validation.enables = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT,\
VK_VALIDATION_FEATURE_ENABLE_BEST_PRACTICES_EXT,VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_EXT,\
VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_RESERVE_BINDING_SLOT_EXT
"""
ALL_PRODUCTS = """
sent = []
def offload(gpu, plain):
    def matmuls(rows, columns):
        sent.append(len(rows))
        return gpu.matmuls(rows, columns)
    return matmuls
vulkan_gemm.offload = offload
status = microgpt.main()
print(*sent, file=sys.stderr)
"""
MANY_PRODUCTS = """
import ctypes, random, types
mistake = sys.argv[1]
if mistake == "out of bounds":
    fields = vulkan_gemm.CONSTANTS
    pack = lambda m, n, k, a, b, c, *others: fields.pack(m, n, k, a, b, c + 2**24, *others)
    vulkan_gemm.CONSTANTS = types.SimpleNamespace(size=fields.size, pack=pack)
if mistake == "race":
    vulkan_gemm.STORAGE_USAGE |= 2  # so that it may be filled
with vulkan_gemm.VulkanGemm() as gpu:
    if mistake == "race":
        fill, end = vulkan_gemm.open_library().vkCmdFillBuffer, gpu.vk.vkEndCommandBuffer
        fill.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32
        gpu.vk.vkEndCommandBuffer = lambda c: [fill(c, gpu.buffers[2].handle, 0, 64, 0) for _ in "ab"] and end(c)
    for vulkan_gemm.MAX_K in (vulkan_gemm.MAX_K, 8):
        for n in (1, 5, 64, 600, 17):
            a = [[random.random() for _ in range(n)] for _ in range(n)]
            gpu.matmuls([a, a, a[:1]], [a, a, a])
"""


def plain_products(many_rows, many_columns):
    return list(map(microgpt.Tensor.matmul, many_rows, many_columns))


class FakeGPU:
    """A device in a world of its own, where things take the seconds that they are said to take."""

    def __init__(self, plain, trip, number, term):
        self.costs, self.now, self.shader_seconds, self.went = (plain, trip, number, term), 0.0, 0.0, None
        self.physical = types.SimpleNamespace(name="fake")

    def clock(self):
        return self.now

    perf_counter = process_time = clock

    def seconds(self, many_rows, many_columns):
        """What a call takes: in plain Python, on the way, and on the device."""
        plain, trip, number, term = self.costs
        shapes = [(len(rows), len(columns), len(rows[0])) for rows, columns in zip(many_rows, many_columns)]
        terms = sum(m * n * k for m, n, k in shapes)
        return plain * terms, number * sum(m * k + n * k + m * n for m, n, k in shapes), trip + term * terms

    def call(self, went, many_rows, many_columns):
        plain, travel, self.shader_seconds = self.seconds(many_rows, many_columns)
        self.now += plain if went == "plain" else travel + self.shader_seconds
        self.went = went
        return plain_products(many_rows, many_columns) if len(many_rows[0]) < 100 else None

    def matmuls(self, many_rows, many_columns):
        return self.call("gpu", many_rows, many_columns)

    def plain(self, many_rows, many_columns):
        return self.call("plain", many_rows, many_columns)


class TestWithoutGPU(Files):
    @unittest.skipUnless(shutil.which("spirv-val"), "needs spirv-val")
    def test_spirv_val_accepts_the_shipped_shader(self):
        command = ["spirv-val", self.file("gemm.spv", vulkan_gemm.load_shader())]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_the_shipped_shader_is_that_of_gemm_comp_and_an_edited_one_is_refused(self):
        self.assertEqual(vulkan_gemm.source_hash(), vulkan_gemm.SHADER_SHA256)
        with unittest.mock.patch("vulkan_gemm.source_hash", lambda: "edited"):
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "edited.*--compile.*glslc"):
                vulkan_gemm.load_shader()

    @unittest.skipUnless(shutil.which("glslc"), "needs glslc")
    def test_compiling_gives_the_same_products_file_and_all(self):
        for name in ("vulkan_gemm.py", "gemm.comp"):
            shutil.copy(os.path.join(HERE, name), name)
        self.file("gemm.comp", self.content("gemm.comp").replace(b"8 x 8", b"eight by eight"))
        done = self.run_script("--compile", script="vulkan_gemm.py")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with open(vulkan_gemm.__file__, "rb") as file:
            before, after = [re.split(rb'SHADER_SHA256 = "\w+"', text) for text in (file.read(), self.content("vulkan_gemm.py"))]
        self.assertEqual((before[0], before[1].partition(b'"""\n\n')[2]), (after[0], after[1].partition(b'"""\n\n')[2]))
        self.assertEqual(self.run_script("-c", "import vulkan_gemm; vulkan_gemm.load_shader()", script="-B").stderr, "")

    def test_without_a_loader_or_the_second_file_one_line_says_so(self):
        self.file("input.txt", "emma")
        with unittest.mock.patch("ctypes.CDLL", side_effect=OSError):
            status, _, errors = self.main("--vulkan")
        self.assertEqual((status, errors.count("\n")), (1, 1))
        self.assertRegex(errors, "^microgpt: error: no Vulkan loader")
        done = self.run_script("--vulkan", script=shutil.copy(SCRIPT, "alone.py"), env={"PYTHONPATH": ""})
        self.assertEqual(done.stderr, "microgpt: error: --vulkan needs vulkan_gemm.py beside microgpt.py\n")
        self.assertEqual(done.returncode, 1)

    def test_where_the_loader_is_looked_for_and_what_to_install(self):
        for platform, program, wanted in (("darwin", "brew", "brew install"), ("win32", "", "driver of your graphics"),
                                          ("linux", "apt", "apt install libvulkan1"), ("linux", "dnf", "dnf install vulkan-l"),
                                          ("linux", "", "Vulkan SDK")):
            tried = unittest.mock.Mock(side_effect=OSError)
            with unittest.mock.patch("sys.platform", platform), unittest.mock.patch("ctypes.CDLL", tried), \
                    unittest.mock.patch("ctypes.WinDLL", tried, create=True), \
                    unittest.mock.patch("shutil.which", lambda name: name == program), \
                    unittest.mock.patch.dict(os.environ, VULKAN_SDK="/sdk"), \
                    self.assertRaisesRegex(vulkan_gemm.VulkanError, rf"^no Vulkan loader [^\n]*{wanted}"):
                vulkan_gemm.open_library()
            paths = [call[0][0].replace(os.sep, "/") for call in tried.call_args_list]
            name = {"darwin": "libvulkan.1.dylib", "win32": "vulkan-1.dll"}.get(platform, "libvulkan.so.1")
            self.assertLessEqual({name, f"/sdk/lib/{name}"}, set(paths))
            self.assertEqual("/opt/homebrew/lib/libvulkan.1.dylib" in paths, platform == "darwin")

    def test_products_go_where_they_are_faster(self):
        shapes = [(1, 8, 8, 8), (1, 16, 16, 16), (1, 32, 32, 32), (1, 128, 128, 128), (1, 1024, 256, 64), (1, 64, 64, 1024)]
        shapes += [(32, 128, 128, 16), (32, 128, 16, 128)]  # attention: 8 documents, 4 heads
        went = set()
        for costs in ((4e-8, 4e-4, 3e-8, 9e-9), (3e-8, 1e-4, 3e-8, 1e-12), (3e-8, 4e-4, 3e-8, 1e-7), (1e-8, 1e-2, 3e-8, 1e-9)):
            fake = FakeGPU(*costs)
            with unittest.mock.patch("vulkan_gemm.time", fake):
                matmuls = vulkan_gemm.offload(fake, fake.plain)
            for count, m, n, k in shapes:
                rows, columns = [[[1.0] * k] * m] * count, [[[1.0] * k] * n] * count
                plain, travel, device = fake.seconds(rows, columns)
                matmuls(rows, columns)
                if not 1 / 2 < plain / (travel + device) < 3:  # whole blocks are computed, and a trip counts twice
                    self.assertEqual(fake.went, "gpu" if travel + device < plain else "plain", (costs, count, m, n, k))
                    went.add((fake.went, count))
            matmuls([[[0.0] * 128] * 128], [[[1.0] * 128] * 128])
            self.assertEqual(fake.went, "plain")  # which leaves zeros out
        self.assertEqual(went, {("gpu", 1), ("gpu", 32), ("plain", 1), ("plain", 32)})

    def test_a_device_that_returns_nan_or_wrong_numbers_is_refused(self):
        for wrong in (math.nan, 0.5):
            fake = FakeGPU(3e-8, 4e-4, 3e-8, 5e-9)
            fake.matmuls = lambda many_rows, many_columns: fake.call("gpu", many_rows, many_columns) and [
                [[wrong] * len(columns) for _ in rows] for rows, columns in zip(many_rows, many_columns)]
            with unittest.mock.patch("vulkan_gemm.time", fake), \
                    self.assertRaisesRegex(vulkan_gemm.VulkanError, "fake computes wrong products"):
                vulkan_gemm.offload(fake, fake.plain)

    def test_kinds_of_devices_and_of_memory_in_the_order_of_preference(self):
        self.assertEqual(list(vulkan_gemm.DEVICE_TYPES.values()), ["discrete", "virtual", "integrated", "cpu", "other"])
        flags, memory = (1, 14, 6, 7, 1 << 6 | 15, 15), vulkan_gemm.VkPhysicalDeviceMemoryProperties(memoryTypeCount=6)
        memory.memoryHeaps[0].size = 1000
        for kind, flag in zip(memory.memoryTypes, flags):
            kind.propertyFlags = flag
        limits = types.SimpleNamespace(maxTexelBufferElements=9, maxStorageBufferRange=9)
        physical, needs = types.SimpleNamespace(memory=memory, limits=limits), vulkan_gemm.VkMemoryRequirements(size=9, memoryTypeBits=63)
        for is_input, order in ((True, [3, 5, 1, 2, 3, 5]), (False, [1, 5, 1, 2, 3, 5])):
            self.assertEqual(vulkan_gemm.Buffer(None, None, physical, is_input)._memory_types(needs), order)


@unittest.skipUnless(count_devices(), "needs a Vulkan loader and device")
class TestVulkan(Files):
    def check(self, rows, columns, c):
        """Some entries of c, each within 1e-5 sqrt(K) of the norms."""
        self.assertEqual((len(c), {len(row) for row in c}), (len(rows), {len(columns)}))
        for i, j in {(0, 0), *((self.rng.randrange(len(rows)), self.rng.randrange(len(columns))) for _ in range(60))}:
            size = math.sqrt(math.fsum(map(mul, rows[i], rows[i])) * math.fsum(map(mul, columns[j], columns[j])))
            error = abs(c[i][j] - math.fsum(map(mul, rows[i], columns[j])))
            self.assertLessEqual(error, 1e-5 * math.sqrt(len(rows[i])) * size)

    def setUp(self):
        super().setUp()
        self.rng = random.Random(1)

    def wrap(self, gpu, name, wrapper):
        """Let a function of Vulkan be wrapper(function, *arguments) from now on."""
        function = getattr(gpu.vk, name)
        setattr(gpu.vk, name, lambda *arguments: wrapper(function, *arguments))

    def test_random_shapes_and_batches_against_plain_python_at_once_or_in_parts(self):
        for limits in ({"MAX_K": 1 << 13}, {"MAX_TERMS": 5000, "MAX_K": 8}, {"MAX_GROUPS": 1}, {"limit": 1 << 12}):
            bytes_at_once = limits.pop("limit", 1 << 20)
            with unittest.mock.patch.multiple("vulkan_gemm", MAX_GROUPS=limits.pop("MAX_GROUPS", 65535), **limits), \
                    vulkan_gemm.VulkanGemm() as gpu:
                for buffer in gpu.buffers:
                    buffer.limit = bytes_at_once
                for top in (9, 70, 9, 200, 70):
                    shapes = [[self.rng.randint(1, top) for _ in "mnk"] for _ in range(3)] * self.rng.randint(1, 2)
                    a, b = ([normal(self.rng, shape[i], shape[2]) for shape in shapes] for i in (0, 1))
                    for buffer in gpu.buffers:  # what was there before must not matter
                        if buffer.capacity:
                            ctypes.memset(buffer.mapped, 0xFF, buffer.capacity)
                    for rows, columns, c in zip(a, b, gpu.matmuls(a, b)):
                        self.check(rows, columns, c)
                    self.assertEqual(gpu.matmul(a[0], microgpt.columns(b[0])), gpu.matmuls(a, b)[0])

    def test_a_submission_is_short_and_a_row_too_long_for_a_buffer_is_refused(self):
        with vulkan_gemm.VulkanGemm() as gpu, unittest.mock.patch("vulkan_gemm.MAX_TERMS", 1 << 16):
            groups, submissions = [], []
            self.wrap(gpu, "vkCmdDispatch", lambda function, *args: groups.append(args[1:]) or function(*args))
            self.wrap(gpu, "vkQueueSubmit", lambda function, *args: submissions.append(len(groups)) or function(*args))
            ones = [[1.0] * 64] * 64
            self.assertEqual(gpu.matmuls([ones, ones[:1]], [ones, ones[:1]]), [[[64.0] * 64] * 64, [[64.0]]])
            self.assertEqual((len(groups), submissions), (5, [1, 2, 3, 4, 5]))
            self.assertEqual(gpu.matmuls([], []), [])
            gpu.buffers[0].limit = 16
            gpu.buffers[0].free()
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "more than .* allows"):
                gpu.matmul([[1.0] * 5], [[1.0]] * 5)

    def test_long_dot_products(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            for k in (8191, 8192, 8193, 95313, 200000):
                a, b = [i % 7 for i in range(k)], [i % 3 for i in range(k)]
                self.assertEqual(gpu.matmul([a], [[x] for x in b]), [[sum(map(mul, a, b))]])

    def test_many_workgroups(self):
        with vulkan_gemm.VulkanGemm() as gpu, unittest.mock.patch("vulkan_gemm.read_rows"):
            groups = []
            self.wrap(gpu, "vkCmdDispatch", lambda function, commands, *sizes: groups.append(sizes))  # does nothing
            gpu.matmul([[1.0]] * 4194305, [[1.0]])
            self.assertLessEqual(max(map(max, groups)), 65535)
            self.assertGreaterEqual(sum(x * y * z for x, y, z in groups), 4194305 / 64)

    def test_nan_and_infinity_stay_where_they_belong_and_misfits_are_refused(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            (a, b), (c, d), (e, f) = gpu.matmul([[1, math.inf], [math.nan, 0], [1, 1]], [[1, 2], [3, 0]])
            self.assertEqual((a, e, f), (math.inf, 4.0, 2.0))
            self.assertTrue(all(map(math.isnan, (b, c, d))))
            for x, y in (([], []), ([[1.0]], [[1.0], [2.0]]), ([[1.0], [1.0, 2.0]], [[1.0]])):
                with self.assertRaises(ValueError):
                    gpu.matmul(x, y)
            for wrong in (None, "a", 10**400, [1.0]):
                for rows in ([[1.0, wrong]], [[1.0, 2.0], [wrong, 2.0]]):
                    with self.assertRaisesRegex(vulkan_gemm.VulkanError, "^not a matrix of numbers: [^\n]*$"):
                        gpu.matmul(rows, [[1.0], [1.0]])
            for rows in ([None], None, ["ab"]):
                with self.assertRaises(vulkan_gemm.VulkanError):
                    gpu.matmul(rows, [[1.0], [1.0]])
            self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])

    def test_threads_take_turns(self):
        def work(number):
            rows = [[float(number)] * 40] * 40
            for _ in range(40):
                right.append(gpu.matmul(rows, rows) == [[40.0 * number * number] * 40] * 40)

        right, interval = [], sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)
        with vulkan_gemm.VulkanGemm() as gpu:
            threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(right, [True] * 240)

    def test_after_an_interrupt_at_any_call_it_goes_on_or_closes_in_order(self):
        names = ["vkBeginCommandBuffer", "vkCmdDispatch", "vkEndCommandBuffer", "vkQueueSubmit", "vkWaitForFences", "vkResetFences"]
        for name, after, goes_on in product(names, (False, True), (False, True)):
            with self.subTest(name, after=after, goes_on=goes_on), vulkan_gemm.VulkanGemm(timeout=2) as gpu:

                def interrupted(function, *arguments):
                    setattr(gpu.vk, name, function)
                    if after:
                        function(*arguments)
                    raise KeyboardInterrupt

                calls = []
                note = lambda each: lambda function, *arguments: calls.append(each) or function(*arguments)
                for each in {*re.findall(r"vk\w+", vulkan_gemm.FUNCTIONS)} - {"vkDestroyInstance"}:
                    self.wrap(gpu, each, note(each))
                self.wrap(gpu, name, interrupted)
                with self.assertRaises(KeyboardInterrupt):
                    gpu.matmul([[5.0]], [[5.0]])
                del calls[:-1]
                if goes_on:
                    self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])
                    begins = [each for each in calls if each in ("vkResetCommandPool", "vkBeginCommandBuffer")]
                    self.assertIn(["vkResetCommandPool", "vkBeginCommandBuffer"], (begins, begins[1:]))  # never begun twice
                    continue
                gpu.close()
                if (name, after) in (("vkQueueSubmit", True), ("vkWaitForFences", False)):
                    self.assertLess(calls.index("vkQueueWaitIdle"), calls.index("vkFreeMemory"))

    def test_it_waits_in_short_slices_and_not_forever(self):
        for late in (3, 1000):
            with vulkan_gemm.VulkanGemm(timeout=2) as gpu:
                slices, freed = [], []

                def wait(function, *arguments):
                    slices.append(arguments[-1])
                    return 2 if len(slices) < late else function(*arguments)  # 2: VK_TIMEOUT

                self.wrap(gpu, "vkWaitForFences", wait)
                self.wrap(gpu, "vkFreeMemory", lambda function, *arguments: freed.append(0) or function(*arguments))
                if late == 3:
                    self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])
                else:
                    with self.assertRaisesRegex(vulkan_gemm.VulkanError, "not finished after 2 seconds"):
                        gpu.matmul([[2.0]], [[3.0]])
                    gpu.close()
                    self.assertEqual(freed, [])  # it may be in use
                    with self.assertRaisesRegex(vulkan_gemm.VulkanError, "closed"):
                        gpu.matmul([[2.0]], [[3.0]])
                self.assertLessEqual(max(slices), 10**8)

    def test_where_one_kind_of_memory_is_full_the_next_one_does(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            for name in ("vkAllocateMemory", "vkMapMemory"):
                refused = []

                def full(function, *arguments):
                    if len(refused) < 1:
                        refused.append(0)
                        raise vulkan_gemm.VulkanError(f"{name}: VK_ERROR_OUT_OF_DEVICE_MEMORY")
                    return function(*arguments)

                for buffer in gpu.buffers:
                    buffer.free()
                self.wrap(gpu, name, full)
                self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])
                self.assertEqual(refused, [0])

    @unittest.skipUnless(os.path.exists("/proc/self/statm"), "reads /proc")
    def test_many_products_and_many_openings_leak_nothing(self):
        if "ALONE" not in os.environ:  # in a process of its own, as other tests leave the driver's pools half full
            command = sys.executable, os.path.abspath(__file__), self.id().partition(".")[2]
            done = subprocess.run(command, env={**os.environ, "ALONE": "1"}, stderr=subprocess.PIPE)
            return self.assertEqual(done.returncode, 0, done.stderr.decode())

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
            for _ in range(300):
                m, n, k = (rng.randint(1, 24) for _ in "mnk")
                gpu.matmul([[0.5] * k] * m, [[0.5] * n] * k)

        def openings():
            for _ in range(10):
                with vulkan_gemm.VulkanGemm() as gpu:
                    gpu.matmul([[1.0]], [[1.0]])
                gpu.close()

        rng = random.Random(2)
        with vulkan_gemm.VulkanGemm() as gpu:
            self.assertLess(growth(products), 20)
        self.assertLess(growth(openings), 800 if sys.implementation.name == "pypy" else 10)

    def test_every_call_that_fails_is_one_error_that_names_it(self):
        real = vulkan_gemm.Vulkan._checked
        calls = [name for name, kind in re.findall(r"(\w+)([=:])\w+", vulkan_gemm.FUNCTIONS) if kind == "="]
        cases, failed = [(name, -2, "OUT_OF_DEVICE_MEMORY") for name in calls], set()
        for name, code, words in [*cases, ("vkQueueSubmit", -4, "DEVICE_LOST")]:
            failing = lambda each, function: real(each, (lambda *args: code) if each == name else function)
            patch = unittest.mock.patch.object(vulkan_gemm.Vulkan, "_checked", staticmethod(failing))
            with self.subTest(name), patch:
                try:
                    with vulkan_gemm.VulkanGemm() as gpu:
                        gpu.matmul([[1.0]], [[1.0]])
                except vulkan_gemm.VulkanError as error:
                    self.assertRegex(str(error), f"^{name}: VK_ERROR_{words}[^\n]*$")
                    failed.add(name)
        self.assertEqual(failed, set(calls))
        with vulkan_gemm.VulkanGemm() as gpu:
            self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])

    @unittest.skipUnless(any(map(os.path.exists, MANIFESTS)), "needs the Khronos validation layer")
    def test_the_validation_layer_speaks_of_mistakes_alone(self):
        self.file("vk_layer_settings.txt", CHECKS)
        for mistake, pattern in (("none", "^$"), ("race", "SYNC-HAZARD-WRITE-AFTER-WRITE"), ("out of bounds", "out of bounds")):
            done = self.run_script(mistake, script=self.driver(MANY_PRODUCTS), env={"VK_INSTANCE_LAYERS": LAYER})
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertRegex(done.stdout, pattern)  # where the layer is not loaded, nobody sees the mistakes

    def test_the_losses_are_those_of_the_tensor_engine_by_whichever_way_products_go(self):
        shutil.copy(os.path.join(HERE, "input.txt"), "input.txt")
        flags = "--steps 3 --layers 2 --d-model 32 --batch-size 4 --stream --lr 0.001 --samples 0".split()
        losses = []
        for more in ([], ["--vulkan"], ["--vulkan", "--workers", "2"]):
            done = self.run_script(*flags, *more)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            losses.append(list(map(float, re.findall(r"loss (\S+)\r", done.stdout))))
        done = self.run_script(*flags, "--vulkan", script=self.driver(ALL_PRODUCTS))
        losses.append(list(map(float, re.findall(r"loss (\S+)\r", done.stdout))))
        for got in losses[1:]:
            self.assertClose([got], losses[:1], 1e-3)
        sent = Counter(map(int, done.stderr.split()))
        products = 2 * 6 + 1  # linear layers, each with two more on the way back
        self.assertEqual(sent, {1: 3 * 3 * products, 16: 3 * 2 * 6})  # all 4 heads of 4 documents at once

    def test_a_device_that_there_is_not_is_refused(self):
        self.file("input.txt", "emma")
        for index in ("99", "x"):
            with unittest.mock.patch.dict(os.environ, MICROGPT_VULKAN_DEVICE=index):
                status, _, errors = self.main("--vulkan", "--steps", "1")
            self.assertEqual((status, errors.count("\n")), (1, 1))
            self.assertRegex(errors, "^microgpt: error: .*MICROGPT_VULKAN_DEVICE")


# 13. All the cores ----------------------------------------------------------------------------------------


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


def unpack(content):
    """The header of a .safetensors file, and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def failing(*args):
    """A model that cannot compute anything."""
    raise UserError("there is no such model")


HANGING = """
import multiprocessing, random, signal
if __name__ == "__main__":
    config, workers = microgpt.Config(9, 4, int(sys.argv[1])), microgpt.Workers(2, microgpt.FastTensor)
    weights, batch = microgpt.initial_weights(config, random.Random(1)), [[0, 1], [1, 2]]
    workers.loss_and_grads(config, weights, batch)
    processes = multiprocessing.active_children()
    print(len(processes), "workers")
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        workers.loss_and_grads(config, weights, batch, 0.2)
    except microgpt.UserError as error:
        print(error)
    workers.stop()
    for process in processes:
        process.join()
    print(len(multiprocessing.active_children()), "workers", flush=True)
    os._exit(0)
"""


class Runs(Files):
    """Tests of whole runs, on 60 names."""

    def setUp(self):
        super().setUp()
        names = microgpt.read_documents(os.path.join(HERE, "input.txt"))[:60]
        self.file("input.txt", "\n".join(names))

    def saved_step(self, name="run"):
        """The step in a checkpoint."""
        return int(unpack(self.content(name))[0]["__metadata__"]["step"])

    def start(self, *flags, handler=signal.SIG_DFL, **options):
        """A long run as a process in a session of its own. It is killed, which every test notices, if it hangs."""
        process = subprocess.Popen(
            [sys.executable, "-u", SCRIPT, "--steps", "1000000", *flags],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
            bufsize=0, start_new_session=True, preexec_fn=lambda: [signal.signal(n, handler) for n in STOPS],
        )
        timer = threading.Timer(self.timeout, process.kill)
        timer.start()
        for cleanup in (process.wait, process.kill, timer.join, timer.cancel):
            self.addCleanup(cleanup)
        for stream in filter(None, (process.stdout, process.stderr)):
            self.addCleanup(stream.close)
        return process

    def read_until(self, process, pattern):
        """Read the output of a process until it matches."""
        text = b""
        while not re.search(pattern, text):
            more = process.stdout.read(65536)
            self.assertTrue(more, f"it ended before {pattern!r}")
            text += more

    def assertEnds(self, process, status, pattern):
        """It ends with this status and one line that matches. Returns the match."""
        _, errors = process.communicate()
        self.assertEqual((process.returncode, errors.count(b"\n")), (status, 1), errors)
        self.assertRegex(errors, b"^microgpt: " + pattern)
        return re.search(pattern, errors)

    def assertGoesOn(self, at):
        """This step is saved, and a run can go on from there."""
        self.assertEqual(self.saved_step(), at)
        status, out, errors = self.main(*f"--resume run --steps {at + 1} --workers 1 --samples 0".split())
        self.assertEqual((status, re.findall(r"step +(\d+) /", out), errors), (0, [str(at + 1)], ""))

    def assertSaved(self, process, status, pattern):
        """It ends with one line that matches, and a run goes on from the step that the line says is saved."""
        line = self.assertEnds(process, status, pattern + rb" step (\d+) is saved in run\n$")
        self.assertGoesOn(int(line[1]))
        os.remove("run")


@needs_posix
class TestWorkers(Runs):
    def losses(self, *flags):
        """The losses, with all their digits, of a run that must end well."""
        status, _, errors = self.main("--samples", "0", "--trace", "trace.jsonl", *flags)
        self.assertEqual((status, errors), (0, ""))
        return self.traced()

    def traced(self):
        return [json.loads(line)["loss"] for line in self.content("trace.jsonl").splitlines()]

    def test_the_mean_over_shares_of_any_size_is_that_of_the_batch(self):
        config, rng = Config(11, 2, 8, 2, 8), random.Random(3)
        weights = microgpt.initial_weights(config, rng)
        batch = [[rng.randrange(11) for _ in range(n)] for n in (9, 2, 5, 3, 7)]
        loss, grads = microgpt.loss_and_grads(config, weights, batch, FastTensor)
        for n in (2, 3, 5):
            workers = microgpt.Workers(n, FastTensor)
            for _ in range(2):
                got_loss, got_grads = workers.loss_and_grads(config, weights, batch)
                self.assertAlmostEqual(got_loss, loss, 12)
                self.assertEqual(list(got_grads), list(grads))
                for name in grads:
                    self.assertClose(got_grads[name], grads[name])
            workers.stop()

    def test_1_2_and_4_workers_come_to_the_same_losses_and_as_many_to_the_same_bytes(self):
        for flags in ("--batch-size 5", "--batch-size 4 --stream --context 8 --arch gpt2"):
            flags += " --steps 20 --layers 2 --d-model 8 --save "
            one = self.losses(*(flags + "one").split())
            self.assertEqual(len(one), 20)
            for n in ("2", "4"):
                for name in "ab":
                    got = self.losses(*(flags + name).split(), "--workers", n)
                    self.assertClose([got], [one])
                self.assertEqual(self.content("a"), self.content("b"))

    def test_a_run_goes_on_with_other_workers_and_the_scalar_engine_has_them_too(self):
        flags = "--batch-size 4 --d-model 8 --schedule constant".split()
        whole = self.losses("--steps", "8", *flags)
        self.losses("--steps", "4", "--workers", "2", "--save", "half", *flags)
        for more in ("--workers 1", "--workers 3", "--workers 4 --engine scalar"):
            os.remove("trace.jsonl")
            got = self.losses("--resume", "half", "--save", "whole", "--steps", "8", *more.split())
            self.assertClose([got], [whole[4:]])

    def test_every_way_to_start_a_process(self):
        flags = "--steps 3 --batch-size 4 --samples 0 --trace trace.jsonl".split()
        one = self.losses(*flags)
        driver = self.driver("import multiprocessing\nif __name__ == '__main__':\n"
                             "    multiprocessing.set_start_method(sys.argv[1])\n    sys.exit(microgpt.main(sys.argv[2:]))")
        for method in multiprocessing.get_all_start_methods():
            done = self.run_script(method, *flags, "--workers", "2", script=driver)
            self.assertEqual((done.returncode, done.stderr), (0, ""), method)
            self.assertClose([self.traced()], [one])

    def test_more_workers_than_documents_are_refused(self):
        self.assertRefused(2, "--workers 3 is more than --batch-size 2", "--batch-size", "2", "--workers", "3")
        self.assertRefused(2, "--workers", "--workers", "0")

    def test_what_goes_wrong_in_a_worker_is_told(self):
        workers = microgpt.Workers(2, FastTensor, failing)
        self.addCleanup(workers.stop)
        with self.assertRaisesRegex(UserError, "there is no such model"):
            workers.loss_and_grads(Config(3), {}, [[0, 1], [1, 2]])

    def test_workers_that_hang_are_not_waited_for_forever(self):
        self.timeout = 30
        for width in (4, 64):  # whose weights fit into a pipe, or do not
            done = self.run_script(str(width), script=self.driver(HANGING))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(done.stdout, "2 workers\na worker cannot go on: it does not answer\n0 workers\n")


@unittest.skipUnless(os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"), "looks at processes in /proc")
class TestWorkersAsProcesses(Runs):
    def start_workers(self, *flags, until=rb"step +9 "):
        """A long run with two workers, and these."""
        process = self.start("--batch-size", "4", "--workers", "2", "--save", "run", *flags)
        self.read_until(process, until)
        while len(children(process.pid)) < 2:  # at once, but for a run that is only about to start them
            self.assertIsNone(process.poll())
        workers = children(process.pid)
        self.addCleanup(self.kill, workers)
        return process, workers

    def kill(self, processes):
        for pid in processes:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)

    def assertGone(self, processes):
        end = time.monotonic() + 30
        while not all(map(gone, processes)):
            self.assertLess(time.monotonic(), end, "a worker is left over")
            time.sleep(0.01)

    def test_a_worker_that_is_killed_is_one_line_and_the_work_is_saved(self):
        for number in (signal.SIGKILL, signal.SIGSEGV):
            process, workers = self.start_workers()
            os.kill(workers[number % 2], number)
            self.assertSaved(process, 1, rb"error: a worker cannot go on: [^\n]*;")
            self.assertGone(workers)

    def test_signals_to_the_whole_group_leave_workers_alone(self):
        for number in STOPS:
            process, workers = self.start_workers()
            os.killpg(process.pid, number)
            self.assertSaved(process, 128 + number, b"interrupted:")
            self.assertGone(workers)

    def test_a_signal_to_the_group_while_workers_start_is_one_line(self):
        rng = random.Random(6)
        for number in STOPS * 2:
            process = self.start("--batch-size", "4", "--workers", "2")
            self.read_until(process, b"params")
            time.sleep(rng.uniform(0, 0.05))  # any moment will do
            os.killpg(process.pid, number)
            self.assertEnds(process, 128 + number, b"interrupted: nothing was saved\n$")

    def test_a_killed_parent_takes_its_workers_along(self):
        for flags, until in (
            ("", b"step +9 "),
            ("--batch-size 20000", b"params"),  # all are busy, for half a minute
            ("--gen-every 1 --max-tokens 1000000 --temperature 9", b"step +1 "),  # all rest, while a sample grows
        ):
            process, workers = self.start_workers(*flags.split(), until=until)
            process.kill()
            process.wait()
            self.assertGone(workers)

    def test_nothing_is_left_over_at_the_end(self):
        process, workers = self.start_workers("--steps", "30", "--samples", "1")
        out, errors = process.communicate()
        self.assertEqual((process.returncode, errors, b"sample  1" in out), (0, b"", True))
        self.assertGone(workers)


# 14. GPT-2 as published -----------------------------------------------------------------------------------


def gelu(a):
    return a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def gpt2_by_hand(config, weights, ids):
    """The logits of a GPT-2, position after position, in loops and sums alone."""

    def linear(name, x):
        return [sum(map(mul, row, x)) + bias for row, bias in zip(weights[name], weights[name + ".bias"][0])]

    def norm(name, x):
        mean = sum(x) / len(x)
        scale = math.sqrt(sum((b - mean) ** 2 for b in x) / len(x) + 1e-5)
        return [(a - mean) / scale * gain + bias for a, gain, bias in zip(x, *weights[name], *weights[name + ".bias"])]

    past, size, logits = [([], []) for _ in range(config.n_layer)], config.n_embd // config.n_head, []
    for t, i in enumerate(ids):
        x = [a + b for a, b in zip(weights["wte"][i], weights["wpe"][t])]
        for layer, (keys, values) in enumerate(past):
            h = norm(f"layer{layer}.ln1", x)
            q, k, v = (linear(f"layer{layer}.attn_w{letter}", h) for letter in "qkv")
            keys.append(k)
            values.append(v)
            found = []
            for start in range(0, config.n_embd, size):
                head = slice(start, start + size)
                exps = [math.exp(sum(map(mul, q[head], key[head])) / math.sqrt(size)) for key in keys]
                for column in zip(*[value[head] for value in values]):
                    found.append(sum(map(mul, exps, column)) / sum(exps))
            x = [a + b for a, b in zip(x, linear(f"layer{layer}.attn_wo", found))]
            h = list(map(gelu, linear(f"layer{layer}.mlp_fc1", norm(f"layer{layer}.ln2", x))))
            x = [a + b for a, b in zip(x, linear(f"layer{layer}.mlp_fc2", h))]
        logits.append(linear("lm_head", norm("ln_f", x)))
    return logits


def slopes(f, rows, h=1e-6):
    """The derivatives of f() by each number in some rows, which it reads."""
    out = [[0.0] * len(row) for row in rows]
    for row, slope in zip(rows, out):
        for j, before in enumerate(row):
            results = []
            for row[j] in (before + h, before - h):
                results.append(f())
            row[j], slope[j] = before, (results[0] - results[1]) / (2 * h)
    return out


class TestGPT2(Test):
    def model(self, *sizes):
        config = Config(*sizes)
        shapes = microgpt.gpt2_shapes(config)
        return config, {name: normal(random.Random(name), *shape) for name, shape in shapes.items()}

    def test_the_operations_and_their_gradients_with_each_engine(self):
        operations = {
            "center": (lambda x: x.center(), lambda x: [[a - sum(row) / len(row) for a in row] for row in x]),
            "*": (lambda x, z: x * z, lambda x, z: [list(map(mul, *rows)) for rows in zip(x, z)]),
            "square": (lambda x: x * x, lambda x: [[a * a for a in row] for row in x]),
            "gelu": (lambda x: x.gelu(), lambda x: [list(map(gelu, row)) for row in x]),
        }
        for seed, name, engine in itertools.product(range(6), operations, (Matrix, Tensor, FastTensor)):
            (f, plain), rng = operations[name], random.Random(seed)
            height, width = rng.randint(1, 3), rng.randint(1, 5)
            inputs = [normal(rng, height, width) for _ in range(plain.__code__.co_argcount)]
            head = normal(rng, 3, width)

            def compute():
                microgpt.tape.clear()
                wrapped = list(map(engine.wrap, inputs))
                out = f(*wrapped)
                loss = out.linear(engine.wrap(head)).cross_entropy([t % 3 for t in range(height)])
                return loss.data, loss, out, wrapped

            _, loss, out, wrapped = compute()
            microgpt.backward(loss)
            with self.subTest(name, engine=engine.__name__, seed=seed):
                self.assertClose(out.data, plain(*inputs))
                for rows, matrix in zip(inputs, wrapped):
                    self.assertClose(matrix.grad, slopes(lambda: compute()[0], rows), 1e-6)
            microgpt.tape.clear()

    def test_its_logits_are_those_of_a_computation_by_hand_in_one_pass_or_several(self):
        config, weights = self.model(11, 2, 8, 2, 8)
        ids = [1, 2, 3, 3, 10, 0, 7, 2]
        for engine in (Matrix, FastTensor):
            w = {name: engine.wrap(rows) for name, rows in weights.items()}
            for chunks in ([ids], [ids[:3], ids[3:4], ids[4:]]):
                got, cache = [], microgpt.new_cache(config)
                for chunk in chunks:
                    positions = range(len(got), len(got) + len(chunk))
                    got += microgpt.gpt2(config, w, chunk, positions, [cache] * len(chunk)).data
                self.assertClose(got, gpt2_by_hand(config, weights, ids))
        microgpt.tape.clear()

    def test_gradients_of_the_whole_model_against_finite_differences(self):
        (config, weights), docs = self.model(5, 1, 4, 2, 4), [[0, 1, 2, 3], [4, 0]]
        compute = lambda engine: microgpt.loss_and_grads(config, weights, docs, engine, microgpt.gpt2)
        (loss, grads), (wanted_loss, wanted) = compute(FastTensor), compute(Matrix)
        self.assertAlmostEqual(loss, wanted_loss, 12)
        self.assertEqual(list(grads), list(weights))
        for name, rows in weights.items():
            self.assertClose(grads[name], wanted[name])
            self.assertClose(grads[name], slopes(lambda: compute(FastTensor)[0], rows), 1e-5)

    def test_it_begins_with_gains_of_1_biases_of_0_and_the_matrices_of_part_one(self):
        config = Config(5, 2, 4, 2, 3)
        lean, full = (draw(config, random.Random(4)) for draw in (microgpt.initial_weights, microgpt.gpt2_weights))
        gains = [f"layer{i}.ln{j}" for i in (0, 1) for j in (1, 2)] + ["ln_f"]
        biases = {name + ".bias": [[0.0] * len(lean[name])] for name in lean if name not in ("wte", "wpe")}
        biases.update({name + ".bias": [[0.0] * 4] for name in gains})
        self.assertEqual(full, {**lean, **biases, **{name: [[1.0] * 4] for name in gains}})
        self.assertEqual({n: (len(w), len(w[0])) for n, w in full.items()}, microgpt.gpt2_shapes(config))


# 15. Optimizers in historical order -----------------------------------------------------------------------


class TestOptimizers(Runs):
    def test_three_steps_of_each_against_its_formula(self):
        lr, b1, b2, eps, decay = 0.1, 0.9, 0.95, 1e-3, 0.1
        settings = {"beta1": b1, "beta2": b2, "eps": eps, "weight_decay": decay}
        square = lambda v, g: b2 * v + (1 - b2) * g * g
        adam = lambda w, g, m, v, t: w - lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        mean = lambda m, g: b1 * m + (1 - b1) * g
        formulas = {  # name -> how m, v and then w move
            "sgd": (lambda m, g: m, lambda v, g: v, lambda w, g, m, v, t: w - lr * g),
            "momentum": (lambda m, g: b1 * m + g, lambda v, g: v, lambda w, g, m, v, t: w - lr * m),
            "rmsprop": (lambda m, g: m, square, lambda w, g, m, v, t: w - lr * g / (math.sqrt(v) + eps)),
            "adam": (mean, square, adam),
            "adamw": (mean, square, lambda w, g, m, v, t: adam(w, g, m, v, t) - lr * decay * w),
        }
        self.assertEqual(list(formulas), list(microgpt.OPTIMIZERS))
        for name, (move_m, move_v, move_w) in formulas.items():
            rng = random.Random(4)
            weights = {"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)}
            m, v = microgpt.zeros(weights), microgpt.zeros(weights)
            wanted = [(w, 0.0, 0.0) for w in flat(weights)]
            for step in range(3):
                grads = {"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)}
                microgpt.OPTIMIZERS[name](weights, grads, m, v, step, lr, **settings)
                for i, (g, (w, mi, vi)) in enumerate(zip(flat(grads), wanted)):
                    mi, vi = move_m(mi, g), move_v(vi, g)
                    wanted[i] = move_w(w, g, mi, vi, step + 1), mi, vi
            with self.subTest(name):
                self.assertClose([flat(weights), flat(m), flat(v)], list(zip(*wanted)), 1e-12)

    def test_clipping_goes_by_the_norm_of_all_gradients_together(self):
        for grads, wanted in (
            ({"a": [[1.0, -1.0]], "b": [[0.5]]}, [1.0, -1.0, 0.5]),  # small enough
            ({"a": [[2.0, 0.0], [0.0, -3.0]], "b": [[6.0]]}, [4 / 7, 0.0, 0.0, -6 / 7, 12 / 7]),  # the norm is 7
            ({"a": [[1.5]], "b": [[1.5]]}, [math.sqrt(2)] * 2),  # above the limit of 2 only together
        ):
            before = repr(grads)
            self.assertClose([flat(microgpt.clip(grads, 2.0))], [wanted], 1e-12)
            self.assertEqual(repr(grads), before)

    def test_schedules_at_their_corners(self):
        def rate(schedule, step, warmup=10, steps=110):
            args = types.SimpleNamespace(lr=0.5, steps=steps, warmup_steps=warmup, schedule=schedule)
            return microgpt.learning_rate(args, step)

        half = lambda share: 0.25 * (1 + math.cos(math.pi * share))
        for name, ends in (("linear", [0.25, 0.375, 0.005]), ("cosine", [half(0.5), half(0.25), half(0.99)]),
                           ("constant", [0.5] * 3)):
            got = [rate(name, 0), rate(name, 9), rate(name, 10), rate(name, 0, 0), rate(name, 99, 100, 100)]
            got += [rate(name, 60), rate(name, 35), rate(name, 109)]
            self.assertClose([got], [[0.05, 0.5, 0.5, 0.5, 0.5, *ends]], 1e-12)

    def test_the_flags_reach_the_optimizer(self):
        flags = "--steps 4 --lr 0.03 --beta1 0.7 --beta2 0.9 --eps 0.1 --weight-decay 0.2 --clip-grad 0.5"
        flags += " --warmup-steps 2 --cosine --batch-size 3 --samples 0 --save run --optimizer "
        for name, optimizer in microgpt.OPTIMIZERS.items():
            self.assertEqual(self.main(*(flags + name).split())[::2], (0, ""))
            rng, docs = random.Random(42), microgpt.read_documents("input.txt")
            rng.shuffle(docs)
            tokenizer = CharTokenizer(docs)
            config = Config(tokenizer.vocab_size)
            weights = microgpt.initial_weights(config, rng)
            m, v = microgpt.zeros(weights), microgpt.zeros(weights)
            for step, lr in enumerate((0.015, 0.03, 0.03, 0.015)):
                batch = [[tokenizer.bos, *tokenizer.encode(doc), tokenizer.bos] for doc in docs[3 * step :][:3]]
                _, grads = microgpt.loss_and_grads(config, weights, batch, FastTensor)
                grads = microgpt.clip(grads, 0.5)
                optimizer(weights, grads, m, v, step, lr, beta1=0.7, beta2=0.9, eps=0.1, weight_decay=0.2)
            saved = numbers(self.content("run"))
            for name in weights:
                self.assertClose([saved[name]], [flat(weights[name])], 1e-12)


# 16. Checkpoints ------------------------------------------------------------------------------------------


def numbers(content):
    """Name -> all numbers of a matrix in a .safetensors file, read as the format says."""
    header, data = unpack(content)
    del header["__metadata__"]
    out = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        code = {"F64": "d", "F32": "f"}[entry["dtype"]]
        out[name] = struct.unpack(f"<{math.prod(entry['shape'])}{code}", data[start:end])
    return out


def pack(header, data):
    """A .safetensors file of a header, as JSON or as it is, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


class Interrupting(io.StringIO):
    """A standard output that sends SIGINT when a text is printed."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, text):
        if text.startswith(self.text):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


class TestCheckpoints(Runs):
    def saved(self, *flags):
        """The bytes of a checkpoint after three steps."""
        self.assertEqual(self.main("--steps", "3", "--samples", "0", "--save", "run", *flags)[::2], (0, ""))
        return self.content("run")

    def test_a_resumed_run_is_exactly_the_run_that_was_not_interrupted(self):
        always = "--steps 60 --d-model 8 --context 8 --samples 3 --div-warn 1e9"
        smooth = "--cosine --warmup-steps 7 --batch-size 2 --clip-grad 1"
        for flags in (
            *(f"--optimizer {name} {smooth}" for name in microgpt.OPTIMIZERS),
            "--stream --val-fraction 0.2 --eval-every 10 --gen-every 10",
            "--arch gpt2 --val-fraction 0.1 --eval-every 15 --gen-every 20 --vocab-size 20",
            "--stream --vocab-size 30 --batch-size 2 --weight-decay 0.1 --optimizer adamw --seed -5",
            *["--workers 2 --batch-size 3"] * hasattr(os, "fork"),
        ):
            flags = f"{flags} {always}".split()
            with self.subTest(flags=flags):
                status, whole, errors = self.main(*flags, "--save", "whole")
                self.assertEqual((status, errors), (0, ""))
                out = Interrupting("step   25 ")
                status, part, errors = self.main(*flags, "--save", "part", out=out)
                self.assertEqual((status, errors), (130, "microgpt: interrupted: step 25 is saved in part\n"))
                status, rest, errors = self.main("--resume", "part")
                self.assertEqual((status, errors), (0, ""))
                self.assertEqual(part[: part.index("step   26 ") if "step   26 " in part else len(part)],
                                 whole[: whole.index("step   26 ")])
                self.assertEqual(rest[rest.index("step   26 ") :], whole[whole.index("step   26 ") :])
                self.assertEqual(self.content("part"), self.content("whole"))
                for name in ("part", "whole"):
                    os.remove(name)

    def test_a_finished_run_only_samples_and_a_longer_one_goes_on(self):
        content, before = self.saved("--warmup-steps", "2"), os.stat("run").st_mtime_ns
        for flags in ("--samples 2", "--samples 2 --steps 0"):
            status, out, errors = self.main("--resume", "run", *flags.split())
            self.assertEqual((status, errors, out.count("loss"), out.count("sample ")), (0, "", 0, 2))
            self.assertEqual((self.content("run"), os.stat("run").st_mtime_ns), (content, before))
        status, out, _ = self.main(*"--resume run --steps 5 --lr 0.5 --save other".split())
        self.assertEqual((re.findall(r"step +(\d+) /", out), self.saved_step("other")), (["4", "5"], 5))
        self.assertEqual(self.content("run"), content)
        for flag in ("--lr=0.5", "--steps=5", "--warmup-steps=2"):
            self.assertIn(f'"{flag}"', unpack(self.content("other"))[0]["__metadata__"]["flags"])
        os.remove("other")
        self.main(*"--resume run --samples 1 --save other".split())  # a finished run has no step to save
        self.assertEqual(numbers(self.content("other")), numbers(content))

    def test_no_steps_save_the_initial_weights(self):
        saved, rng = numbers(self.saved("--steps", "0")), random.Random(42)
        rng.shuffle(list(range(60)))
        config = Config(CharTokenizer(microgpt.read_documents("input.txt")).vocab_size)
        weights = microgpt.initial_weights(config, rng)
        self.assertEqual({name: list(saved[name]) for name in weights}, {name: flat(rows) for name, rows in weights.items()})

    def test_what_contradicts_the_model_is_refused_with_both_values(self):
        self.saved("--vocab-size", "9")
        for flag, new, old in (("--layers", 2, 1), ("--d-model", 32, 16), ("--heads", 2, 4), ("--context", 8, 16),
                               ("--arch", "gpt2", "microgpt"), ("--vocab-size", 5, 9)):
            message = f"{flag} {new} contradicts run, which has {old}$"
            self.assertRefused(2, message, "--resume", "run", flag, str(new))
        self.assertRefused(2, "--stream True contradicts run", "--resume", "run", "--stream")
        self.file("greek.txt", "\u03b1\u03b2\u03b3")
        status, out, errors = self.main(*"--resume run --steps 9 --corpus greek.txt".split())
        self.assertEqual((status, errors.count("\n"), "step" in out), (1, 1, False))
        self.assertIn("\u03b1", errors)

    def test_the_corpus_is_read_again_unless_another_is_given(self):
        names = microgpt.read_documents("input.txt")
        self.saved("--corpus", self.file("a.txt", "\n".join(names)))
        self.file("b.txt", "\n".join(names[:7]))
        for flags, n in (([], 60), (["--corpus", "b.txt"], 7)):
            self.assertIn(f"num docs: {n}\n", self.main("--resume", "run", "--samples", "0", *flags)[1])

    def test_what_safetensors_asks_of_a_file(self):
        for flags in ("--vocab-size 9", "--arch gpt2 --stream"):
            content, tiles = self.saved(*flags.split(), "--seed", "7"), []
            header, data = unpack(content)
            self.assertEqual((len(content) - len(data)) % 8, 0)
            self.assertTrue(all(type(value) is str for value in header.pop("__metadata__").values()))
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                self.assertEqual((entry["dtype"], end - start), ("F64", 8 * math.prod(entry["shape"])))
                tiles += [start, end]
            self.assertEqual(sorted(tiles), sorted([0, *tiles[1:-1], len(data)]))
            self.assertEqual(len(set(tiles)), len(header) + 1)
            os.remove("run")

    def test_weights_alone_in_single_precision_resume(self):
        header, data = unpack(self.saved())
        weights = {name: row for name, row in numbers(self.content("run")).items() if "optimizer" not in name}
        new, data = {"__metadata__": header["__metadata__"]}, b""
        for name, row in weights.items():
            start, data = len(data), data + struct.pack(f"<{len(row)}f", *row)
            new[name] = {"dtype": "F32", "shape": header[name]["shape"], "data_offsets": [start, len(data)]}
        self.file("run", pack(new, data))
        status, out, errors = self.main(*"--resume run --steps 5 --samples 1 --lr 0".split())
        self.assertEqual((status, errors, out.count("loss")), (0, "", 2))
        after = numbers(self.content("run"))
        self.assertClose([after[name] for name in weights], list(weights.values()), 1e-7)

    def damaged_files(self):
        """Yield the kind of damage and the damaged file, of every kind that is always noticed."""
        content = self.saved(*"--d-model 4 --context 4 --layers 1 --vocab-size 2".split())
        rng, (header, data), length = random.Random(9), unpack(content), int.from_bytes(content[:8], "little")
        for n in [*range(10), length + 7, length + 8, length + 9, *(rng.randrange(len(content)) for _ in range(60))]:
            yield f"cut after {n}", content[:n]
        for i, whole in enumerate((content + b"x", content + bytes(8), bytes(100), content[8:], content * 2)):
            yield f"put together {i}", whole
        for n in (0, 1, 7, length - 1, length + 1, len(content), 2**32, 2**63, 2**64 - 1):
            yield f"length {n}", n.to_bytes(8, "little") + content[8:]
        for text in (b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"null", b"[]", b"{}", b'{"a":1}', b'"a"',
                     b"\xff", b" " * 3_000_000, b"[" + b"{}," * 300_000 + b"{}]", b'{"__metadata__":[]}',
                     b'{"__metadata__":{"a":1}}', b'{"__metadata__":{},"a":{"dtype":NaN}}'):
            yield f"header {text[:40]}", pack(text, data)
        for key, values in {
            "dtype": (None, 1, "F64x", "BF16", "F32", [], {"a": 1}),
            "shape": (None, 1, "F64", [], [4], [16], ["x" * 1000, 1000000], [4, 4, 1], [0, 4], [-4, -4], [4.0, 4], ["4", 4], [True, 16], [[4], 4],
                      [4, 10**18], [0, 2**63], [2, 8], [16, 1], [4, 5], {"a": 1}),
            "data_offsets": (None, 1, "x", [], [1], [0, 0], [0, 1, 2], [8, 136], [-128, 0], [0.5, 1], [0, 2**63], {"a": 1}),
        }.items():
            for value in values:
                yield f"{key} {value}", pack({**header, "wpe": {**header["wpe"], key: value}}, data)
        fields, merges = header["__metadata__"], [[26 + i, 26 + i] for i in range(60)]
        bad = {name: ["", "null", '"x"', "[" * 5000, "1e999", "NaN", "[[0, 1]]"] for name in microgpt.FIELDS}
        bad["step"] += ["[]", "{}", "-1", "1" + "0" * 99]
        bad["recent"] += ["[[]]", "2", '["x"]', "[NaN]", "[1e999]"]
        bad["random"] += ["[]", "{}", "2", "[1, 2, 3]", "[3, [1, 2], null]"]
        bad["characters"] += ["[]", "2", '"ba"', '"aa"', '"abc"']
        bad["merges"] += map(json.dumps, ([[0, 99]], [[0]], [[-1, 0]], [["a", "b"]], [[0, 0]] + merges, 2, [1, 2, 3]))
        bad["flags"] += map(json.dumps, ([["--steps=1"]], [None], {"-h": 1}, [1.5], [], 2))
        for flag in ("--steps=x --lr=-1 --nonsense=1 --d-model=32 --heads=3 --arch=gpt2 --layers=1000000000 --context=9 "
                     "--n-embd=16.0 --save=x --resume=x --plot=x.svg --help -h -hh names.txt").split():
            bad["flags"] += [json.dumps([*json.loads(fields["flags"]), flag]), json.dumps([flag])]
        for name, values in bad.items():
            for value in values:
                yield f"{name} {value[:40]}", pack({**header, "__metadata__": {**fields, name: value}}, data)
            yield f"no {name}", pack({**header, "__metadata__": {n: v for n, v in fields.items() if n != name}}, data)
        for old, new in (("wpe", "wpf"), ("optimizer.v.wpe", "optimizer.w.wpe"), ("wpe", "a\nb"), ("wpe", None),
                         ("optimizer.m.wte", None), ("__metadata__", None)):
            yield f"{new} for {old}", pack({new if n == old else n: v for n, v in header.items() if n != old or new}, data)
        stray = {"dtype": "F64", "shape": [1, 1], "data_offsets": [len(data), len(data) + 8]}
        yield "stray", pack({**header, "stray": stray}, data + bytes(8))
        for name, number in (("wte", math.nan), ("wpe", math.inf), ("lm_head", -math.inf), ("optimizer.v.wte", -1e-9)):
            at = header[name]["data_offsets"][0]
            yield f"{number} in {name}", pack(header, data[:at] + struct.pack("<d", number) + data[at + 8 :])

    def test_a_damaged_file_is_one_line(self):
        damaged = list(self.damaged_files())
        content, rng = self.content("run"), random.Random(9)
        self.assertEqual(self.main(*"--resume run --steps 0 --samples 0".split())[::2], (0, ""))
        while len(damaged) < 500:  # a flipped bit need not be noticed: a digit may become another
            at = rng.randrange(len(content) - len(unpack(content)[1]))
            flipped = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
            damaged.append((f"flipped bit in byte {at}", flipped))
        for kind, file in damaged:
            self.file("run", file)
            with self.subTest(kind):
                status, out, errors = self.main(*"--resume run --steps 0 --samples 0".split())
                if status or not kind.startswith("flipped"):
                    self.assertEqual((status, errors.count("\n"), out), (1, 1, ""))
                    self.assertRegex(errors, "^microgpt: error: cannot read run: ")

    def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(self):
        events, replace = [], os.replace
        with unittest.mock.patch("os.fsync", lambda file: events.append(os.fstat(file).st_size)), \
             unittest.mock.patch("os.replace", lambda *paths: events.append(paths) or replace(*paths)):
            content = self.saved()
        part, target = f"run.{os.getpid()}.part", os.path.realpath("run")
        self.assertEqual(events, [len(content), (os.path.realpath(part), target)])
        self.assertEqual(sorted(os.listdir()), ["input.txt", "run"])

    @unittest.skipUnless(hasattr(os, "fork"), "needs symbolic links and modes")
    def test_links_and_modes_are_kept(self):
        self.saved()
        os.rename("run", "real")
        os.symlink("real", "run")
        os.symlink("elsewhere", f"real.{os.getpid()}.part")  # a trap: nothing may be written through it
        for mode in (0o640, 0o604):
            os.chmod("real", mode)
            self.assertEqual(self.main(*"--resume run --steps 5 --samples 0".split())[::2], (0, ""))
            self.assertTrue(os.path.islink("run"))
            self.assertEqual((self.saved_step("real"), os.stat("real").st_mode & 0o777), (5, mode))
            self.assertEqual(sorted(os.listdir()), ["input.txt", "real", "run"])
            self.saved()

    def test_running_means_of_another_optimizer_are_not_used(self):
        self.saved("--optimizer", "momentum")  # leaves v = 0, by which adam would divide
        flags = "--resume run --steps 20 --samples 0 --schedule constant --trace run.jsonl".split()
        status, _, errors = self.main(*flags, "--optimizer", "adam")
        line = "microgpt: note: adam starts anew, without the running means of momentum\n"
        self.assertEqual((status, errors), (0, line))
        self.assertLess(max(json.loads(line)["loss"] for line in self.content("run.jsonl").splitlines()), 6)
        self.assertEqual(self.main(*flags)[::2], (0, ""))  # from now on it is adam's

    def test_what_other_programs_need_to_know_of_a_file(self):
        for arch, flags in (("microgpt", ""), ("gpt2", "--layers 2 --d-model 8 --heads 2 --context 12")):
            header, data = unpack(self.saved("--arch", arch, *flags.split()))
            metadata, config = header["__metadata__"], Config(26, 1, 16, 4, 16)
            if arch == "gpt2":
                config = Config(26, 2, 8, 2, 12)
            self.assertEqual((metadata["format"], json.loads(metadata["config"])), ("pt", vars(config)))
            for name, (rows, columns) in microgpt.MODELS[arch][1](config).items():
                self.assertEqual(header[name]["shape"], [rows, columns] if rows > 1 else [columns])
            header["__metadata__"]["of another program"] = "{["
            self.file("run", pack(header, data))
            self.assertEqual(self.main(*"--resume run --steps 0 --samples 1".split())[::2], (0, ""))
            os.remove("run")

    def test_a_foreign_file_is_refused_with_what_is_wrong(self):
        header, data = unpack(self.saved())
        tensors, metadata = microgpt.read_safetensors("run")
        one_sided = {name: rows for name, rows in tensors.items() if "optimizer.v" not in name}
        microgpt.write_safetensors("one-sided", one_sided, metadata)
        for pattern, file in (
            ("it holds BF16; F32 and F64 are read", pack({**header, "wpe": {**header["wpe"], "dtype": "BF16"}}, data)),
            ("it was not saved by this program: no flags in its metadata", pack({"a": header["wte"]}, data[: header["wte"]["data_offsets"][1]])),
            ("it is cut short", pack(header, data[:-8])), ("not a file", None),
            ("optimizer.v.wte", self.content("one-sided")), ("", pack({"x" * 100_000: 1}, data)),
            ("", pack({**header, "wpe": {**header["wpe"], "dtype": "x" * 100_000}}, data)),
        ):
            os.remove("run")
            if file:
                self.file("run", file)
            else:
                os.mkdir("run")
            status, _, errors = self.main("--resume", "run")
            self.assertRegex(errors, f"^microgpt: error: cannot read run: .*{pattern}")
            self.assertEqual((status, errors.count("\n"), len(errors) < 250), (1, 1, True))
            if not file:
                os.rmdir("run")
                self.file("run", "")

    def test_what_must_not_or_cannot_be_replaced_is_refused_before_the_first_step(self):
        names = self.content("input.txt")
        places = [os.path.join("no", "such", "folder", "x"), self.folder.name, "input.txt"]
        if hasattr(os, "geteuid") and os.geteuid():  # root may write anywhere
            os.mkdir("locked", 0o500)
            places.append(os.path.join("locked", "x"))
        for place in places:
            status, out, errors = self.main("--save", place, "--steps", "1")
            self.assertEqual((status in (1, 2), errors.count("\n"), "step" in out), (True, 1, False), errors)
        self.assertEqual((sorted({*os.listdir()} - {"locked"}), self.content("input.txt")), (["input.txt"], names))
        self.saved()
        self.saved("--seed", "2")  # another checkpoint may be replaced

    def test_weights_that_overflow_leave_the_last_good_checkpoint(self):
        content = self.saved()
        flags = "--resume run --steps 9 --schedule constant --save-every 1 --lr 1e300".split()
        status, _, errors = self.main(*flags, *"--optimizer adamw --weight-decay 1e9".split())
        self.assertRegex(errors.splitlines()[-1], "^microgpt: error: the (weights have overflowed|loss of step)")
        self.assertEqual((status, self.content("run")), (1, content))
        status, _, errors = self.main(*flags)
        self.assertRegex(errors.splitlines()[-1], "^microgpt: error: .*; step 4 is saved in run$")
        self.assertEqual((status, self.saved_step()), (1, 4))


LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"


@needs_posix
class TestInterruptions(Runs):
    def test_a_full_disk_is_a_warning_until_the_end_and_leaves_the_old_checkpoint(self):
        self.assertEqual(self.main(*"--steps 3 --samples 0 --save run".split())[::2], (0, ""))
        content = self.content("run")
        script = self.driver(LIMIT.format(20000) + "sys.exit(microgpt.main())")
        done = self.run_script(*"--resume run --steps 6 --save-every 2 --samples 0".split(), script=script)
        warning, error = done.stderr.splitlines()
        self.assertRegex(warning, "^microgpt: warning: cannot save run: File too large$")
        self.assertRegex(error, "^microgpt: error: cannot save run: File too large")
        self.assertEqual((done.returncode, "step    6" in done.stdout), (1, True))
        self.assertEqual(self.content("run"), content)
        self.assertEqual(sorted(os.listdir()), ["driver.py", "input.txt", "run"])

    def test_killed_at_any_moment_the_file_is_whole(self):
        rng = random.Random(7)
        for _ in range(15):
            flags = ["--resume", "run"] if os.path.exists("run") else []
            process = self.start("--save-every", "1", "--save", "run", *flags)
            step = self.saved_step() if flags else 0
            self.read_until(process, b"step +%d " % (step + rng.randint(3, 9)))
            time.sleep(rng.uniform(0, 0.01))  # any moment will do
            process.kill()
            process.communicate()
        self.assertGoesOn(self.saved_step())

    def test_samplers_and_other_trainers_leave_a_trainer_and_its_file_alone(self):
        trainers = [self.start("--save-every", "1", "--save", "run", "--seed", seed) for seed in "1"]
        self.read_until(trainers[0], b"step +5 ")
        trainers.append(self.start("--save-every", "1", "--save", "run", "--seed", "2"))
        self.read_until(trainers[1], b"step +5 ")
        drained = [threading.Thread(target=process.stdout.read) for process in trainers]  # so that they go on
        for thread in drained:
            thread.start()
        for _ in range(10):
            status, out, errors = self.main(*"--resume run --steps 0 --samples 1".split())
            self.assertEqual((status, errors), (0, ""), out)
        self.assertEqual([process.poll() for process in trainers], [None, None])
        for process, thread in zip(trainers, drained):
            process.terminate()
            process.wait()
            thread.join()
        self.assertEqual([process.returncode for process in trainers], [143, 143])
        self.assertEqual(sorted(os.listdir()), ["input.txt", "run"])
        self.assertGoesOn(self.saved_step())

    def test_a_signal_in_training_ends_the_step_and_saves(self):
        for number in STOPS:
            process = self.start("--save", "run")
            self.read_until(process, rb"step +50 ")
            process.send_signal(number)
            self.assertSaved(process, 128 + number, b"interrupted:")

    def test_a_second_signal_ends_at_once_with_nothing_to_say(self):
        docs = ["a", "b" * 300]
        random.Random(42).shuffle(order := list(docs))
        self.file("input.txt", "\n".join(docs if order[0] == "a" else docs[::-1]))
        process = self.start(*"--engine scalar --context 300 --save run".split())
        self.read_until(process, rb"step +1 ")  # the second step takes a second or so
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        self.assertEqual((process.wait(), process.stderr.read()), (143, b""))
        self.assertFalse(os.path.exists("run"))

    def test_a_signal_outside_of_training_ends_at_once(self):
        rng = random.Random(1)
        self.file("long.txt", "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)))
        for flags, until, line in (
            ("--steps 1 --samples 1000000 --save run", rb"sample 99", rb"interrupted: step 1 is saved in run\n$"),
            ("--corpus long.txt --stream --vocab-size 50000", b"num docs", rb"interrupted: nothing was saved\n$"),
        ):
            process = self.start(*flags.split())
            self.read_until(process, until)
            process.send_signal(signal.SIGTERM)
            self.assertEnds(process, 143, line)

    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy does not know which signals were ignored at its start")
    def test_signals_that_were_ignored_stay_ignored(self):
        process = self.start("--save", "run", handler=signal.SIG_IGN)
        self.read_until(process, rb"step +9 ")
        for number in STOPS:
            process.send_signal(number)
        self.read_until(process, rb"step +\d*99 ")
        self.assertIsNone(process.poll())

    def test_whatever_takes_the_output_away_the_work_is_saved(self):
        process = self.start("--save", "run")
        self.read_until(process, rb"step +50 ")
        process.stdout.close()
        self.assertEqual((process.wait(), process.stderr.read()), (1, b""))
        at = self.saved_step()
        self.assertGreaterEqual(at, 49)  # the step whose line could not be printed is not made
        self.assertGoesOn(at)
        os.remove("run")
        script = self.driver(LIMIT.format(40000) + "sys.exit(microgpt.main())")
        with open("out", "wb") as out:  # it becomes too large, not the checkpoint
            flags = "--steps 100000 --d-model 4 --context 4 --save run".split()
            done = self.run_script(*flags, script=script, stdout=out)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
        self.assertRegex(done.stderr, "^microgpt: error: cannot write the output: File too large")
        self.assertGoesOn(self.saved_step())


# 17. Looking inside ---------------------------------------------------------------------------------------


def by_hand(weights, ids, n_layer, n_head):
    """Probabilities and attention shares of a model, position after position, in loops and sums alone."""
    def product(name, x):
        return [sum(a * b for a, b in zip(row, x)) for row in weights[name]]

    def norm(x):
        return [a / math.sqrt(sum(b * b for b in x) / len(x) + 1e-5) for a in x]

    def shares_of(scores):
        exps = [math.exp(a - max(scores)) for a in scores]
        return [a / sum(exps) for a in exps]

    size = len(weights["wte"][0]) // n_head
    past = [([], []) for _ in range(n_layer)]
    probabilities, maps = [], [[[] for _ in range(n_head)] for _ in range(n_layer)]
    for t, i in enumerate(ids):
        x = norm([a + b for a, b in zip(weights["wte"][i], weights["wpe"][t])])
        for layer, (keys, values) in enumerate(past):
            q, k, v = (product(f"layer{layer}.attn_w{letter}", norm(x)) for letter in "qkv")
            keys.append(k)
            values.append(v)
            y = []
            for head in range(n_head):
                channels = range(head * size, (head + 1) * size)
                shares = shares_of([sum(q[c] * key[c] for c in channels) / math.sqrt(size) for key in keys])
                maps[layer][head].append(shares)
                y += [sum(share * value[c] for share, value in zip(shares, values)) for c in channels]
            x = [a + b for a, b in zip(x, product(f"layer{layer}.attn_wo", y))]
            h = [max(0, a) for a in product(f"layer{layer}.mlp_fc1", norm(x))]
            x = [a + b for a, b in zip(x, product(f"layer{layer}.mlp_fc2", h))]
        probabilities.append(shares_of(product("lm_head", x)))
    return probabilities, maps


class Commands(Files):
    """Tests of command lines, on five names."""

    def setUp(self):
        super().setUp()
        self.file("input.txt", "emma\nolivia\nava\nnoah\nliam\n")

    def printed(self, flags, *more):
        """What a run prints that has nothing to complain of. Its flags are a string, and perhaps some odd ones."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unittest shows more of them than a run does
            status, out, errors = self.main(*flags.split(), *more)
        self.assertEqual((status, errors), (0, ""), (flags, more))
        return out

    def weights(self, name="run"):
        tensors, _ = microgpt.read_safetensors(name)
        return {name: rows for name, rows in tensors.items() if not name.startswith("optimizer.")}

    def trace(self, name="run.jsonl"):
        return [json.loads(line) for line in self.content(name).splitlines()]


def losses(out):
    """The losses of the steps, as they are printed."""
    return re.findall(r"\| loss (\S+)\r", out)


class Explained:
    """What --explain prints: rows of words, the means, and maps[layer][head] as rows of shades from 0 to 4."""

    def __init__(self, out):
        table, *maps = out[out.index("\ntoken") + 1 :].split("\n\nlayer ")
        self.lines = table.splitlines()[1:]
        *self.rows, mean = [line.split() for line in self.lines]
        self.means, self.maps, self.widest = list(map(float, mean[1:])), {}, max(map(len, out.split("\n")))
        for block in maps:
            title, _, *rows = block.rstrip().splitlines()
            layer, first, last = map(int, re.match(r"(\d+), heads (\d+) to (\d+):", title).groups())
            heads = self.maps.setdefault(layer, [])
            assert len(heads) == first and len(rows) == len(self.rows)
            heads += [[] for _ in range(first, last + 1)]
            for t, row in enumerate(rows):
                shades = ["·.░:▒+▓*█#".index(char) // 2 for char in row[1:] if char in "·.░:▒+▓*█#"]
                assert len(shades) == (t + 1) * (last - first + 1), block
                for head in heads[first:]:
                    head.append(shades[: t + 1])
                    del shades[: t + 1]


class TestExplain(Commands):
    def test_its_numbers_and_shades_are_those_of_a_computation_by_hand(self):
        flags = "--layers 2 --d-model 8 --context 8 --steps 40 --lr 0.1 --samples 0 --save run --explain emma"
        got = Explained(self.printed(flags))
        names = sorted(set("emmaolivianoah")) + ["^"]
        ids = [names.index(char) for char in "^emma^"]
        probabilities, maps = by_hand(self.weights(), ids[:-1], 2, 4)
        logs = []
        for (token, following, *numbers), i, target, p in zip(got.rows, ids, ids[1:], probabilities):
            self.assertEqual((token, following), (names[i], names[target]))
            logs.append(math.log(p[target]))
            wanted = [p[target], -logs[-1], -logs[-1] / math.log(2)]
            best = sorted(range(len(p)), key=p.__getitem__)[:-6:-1]
            self.assertEqual(numbers[3::2], [names[i] for i in best])
            for a, b in zip(numbers[:3] + numbers[4::2], wanted + [p[i] for i in best]):
                self.assertAlmostEqual(float(a), b, delta=6e-4)
        for a, b in zip(got.means, [-sum(logs) / 5, -sum(logs) / 5 / math.log(2)]):
            self.assertAlmostEqual(a, b, delta=6e-4)
        shades = {layer: [[[round(4 * p) for p in row] for row in head] for head in heads]
                  for layer, heads in enumerate(maps)}
        self.assertEqual(got.maps, shades)
        self.assertGreater(len({shade for rows in shades[1] for shade in rows[4]}), 2)  # it is not all the same

    def test_the_mean_is_the_loss_of_the_next_step_and_a_checkpoint_says_the_same(self):
        self.file("input.txt", "emma\n")
        for arch in microgpt.MODELS:
            flags = f"--arch {arch} --steps 5 --samples 0 --explain emma --save"
            out = self.printed(flags, arch)
            resumed = self.printed(f"--samples 0 --explain emma --resume {arch}")
            self.assertEqual(out[out.index("token") :], resumed[resumed.index("token") :])
            self.printed(f"--steps 6 --samples 0 --trace run.jsonl --resume {arch}")
            self.assertAlmostEqual(Explained(out).means[0], self.trace()[0]["loss"], delta=6e-4)

    def test_maps_that_do_not_fit_side_by_side_go_below_each_other(self):
        self.file("input.txt", "abcdefghijklmnop\n")
        for heads, width in ((4, 16), (12, 24), (1, 8)):
            out = self.printed(f"--steps 1 --samples 0 --heads {heads} --d-model {width} --explain abcdefghijklmnop")
            got = Explained(out)
            self.assertEqual((len(got.rows), len(got.maps[0])), (16, heads))
            self.assertLessEqual(got.widest, 80)
        long = self.printed("--steps 1 --samples 0 --context 99 --explain", "abcdefghijklmnop" * 6)
        self.assertEqual([len(rows[96]) for rows in Explained(long).maps[0]], [97] * 4)  # wider than a terminal

    def test_without_utf_8_it_is_all_ascii(self):
        flags = "--steps", "1", "--samples", "0", "--explain", "ava"
        blocks = self.run_script(*flags).stdout
        self.assertIn("█", blocks)
        for encoding in ("ascii", "latin-1", "cp1252"):
            done = self.run_script(*flags, env={"PYTHONIOENCODING": encoding})
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(done.stdout, blocks.translate(str.maketrans("·░▒▓█", ".:+*#")))

    def test_odd_tokens_and_odd_numbers_keep_to_their_columns(self):
        self.file("input.txt", "a\t \\'\"é☃a^b\n" * 2)
        for more in ("--vocab-size 2", "--lr 1000"):  # long tokens; chances of almost 0
            out = self.printed(f"--steps 3 --samples 0 {more} --explain", "a\t \\'\"é☃a^b")
            self.assertTrue(all(line.isprintable() for line in out.split("\n")[4:]))
            self.assertNotRegex(out, "inf|nan")
        self.assertEqual(len({line.index(".") for line in Explained(out).lines[:-1]}), 1)

    def test_a_text_longer_than_the_context_is_explained_up_to_there(self):
        got = Explained(self.printed("--steps 1 --samples 0 --context 4 --explain emmaava"))
        self.assertEqual([row[:2] for row in got.rows], [["^", "e"], ["e", "m"], ["m", "m"], ["m", "a"]])
        got = Explained(self.printed("--steps 1 --samples 0 --explain", ""))
        self.assertEqual([row[:2] for row in got.rows], [["^", "^"]])
        got = Explained(self.printed("--steps 1 --samples 0 --stream --context 4 --explain av"))
        self.assertEqual([row[:2] for row in got.rows], [["a", "v"]])


SVG = "{http://www.w3.org/2000/svg}"


def noisy(steps, first=1):
    rng = random.Random(1)
    return [(first + i, 2 + math.exp(-i / 200) + rng.random() / 4) for i in range(steps)]


class Picture:
    """A picture: its texts, the ticks of both axes as (place, number), its curves in places and in numbers."""

    def __init__(self, svg):
        self.svg, self.root = svg, ElementTree.fromstring(svg.encode())  # fails on what is no XML, or no UTF-8
        self.texts = [(float(e.get("x")), float(e.get("y")), e.get("text-anchor"), e.text)
                      for e in self.root.iter(SVG + "text")]
        numbers = [(*text[:3], float(text[3])) for text in self.texts if re.fullmatch(r"[-+\d.e]+", text[3])]
        self.up = [(y - 4, number) for _, y, anchor, number in numbers if anchor == "end"]
        self.across = [(x, number) for x, _, anchor, number in numbers if anchor == "middle"]
        self.curves = {e.get("class"): [tuple(map(float, pair.split(","))) for pair in e.get("points").split()]
                       for e in self.root.iter(SVG + "polyline")}

    def data(self, name):
        """A curve as (step, loss), read off the ticks."""
        (x1, step1), *_, (x2, step2) = self.across
        (y1, loss1), *_, (y2, loss2) = self.up
        return [(step1 + (x - x1) / (x2 - x1) * (step2 - step1), loss1 + (y - y1) / (y2 - y1) * (loss2 - loss1))
                for x, y in self.curves[name]]


class TestPlot(Commands):
    def draw(self, losses, validations=()):
        """A picture, in which all that goes for every picture has been found true."""
        picture = Picture(microgpt.loss_plot("microgpt", list(losses), list(validations)))
        self.assertNotRegex(picture.svg, r'(points|d|x|y)="[^"]*(nan|inf)|<script|href|url\(|@import')
        self.assertRegex(picture.svg, r"prefers-color-scheme: dark")
        self.assertLess(len(picture.svg), 300_000)
        self.assertEqual(list(picture.curves), ["loss", "mean", "validation"])
        for points in picture.curves.values():
            self.assertEqual(points, sorted(points, key=lambda point: point[0]))
            self.assertTrue(all(70 <= x <= 770 and 60 <= y <= 450 for x, y in points))
        for x, y, anchor, text in picture.texts:
            left = x - 7.3 * len(text) * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            self.assertTrue(-1 <= left and left + 7.3 * len(text) <= 801 and 10 <= y <= 498, text)
        for ticks in (picture.up, picture.across):
            numbers = [number for _, number in ticks]
            self.assertEqual(numbers, sorted(set(numbers)))
            self.assertTrue(2 <= len(numbers) <= 12, numbers)
            for gap in (b - a for a, b in zip(numbers, numbers[1:])):
                self.assertIn(float(f"{gap:.2e}".split("e")[0]), (1, 2, 5), numbers)
        return picture

    def test_every_case_is_a_valid_picture(self):
        for name, losses, validations in (
            ("no step", [], []),
            ("one step", noisy(1), []),
            ("one of each", noisy(1), noisy(1)),
            ("two steps", noisy(2), noisy(2)[1:]),
            ("validation alone", [], [(50, 2.5)]),
            ("equal losses", [(i, 2.0) for i in range(1, 100)], [(99, 2.0)]),
            ("nothing lost", [(i, 0.0) for i in range(1, 100)], [(99, 0.0)]),
            ("almost equal", [(i, 2 + i * 1e-9) for i in range(1, 50)], []),
            ("almost 0", [(i, i * 1e-12) for i in range(1, 50)], []),
            ("nan alone", [(1, math.nan)], [(1, math.nan)]),
            ("huge", [(1, 1.7e308)], []),
            ("large", [(i, i * 1e90) for i in range(1, 99)], []),
            ("resumed", noisy(11, 50_000), [(50_010, 2.2)]),
            ("very late", noisy(11, 50_000_000), []),
        ):
            with self.subTest(name):
                picture = self.draw(losses, validations)
                finite = [y for _, y in losses if y < 1e99]
                self.assertEqual(len(picture.curves["loss"]), len(finite))
                self.assertEqual(len(picture.curves["mean"]), len(finite))

    def test_ticks_are_round_and_different(self):
        rng = random.Random(2)
        for _ in range(300):
            first, low, high = (int(10 ** rng.uniform(0, 6)), *(10 ** rng.uniform(-6, 6) for _ in range(2)))
            self.draw([(first + i, rng.uniform(low, high)) for i in range(rng.choice((1, 2, 3, 10, 100)))])

    def test_points_are_where_they_should_be(self):
        losses = noisy(200, 300)
        picture = self.draw(losses, losses[19::20])
        for name, points in (("loss", losses), ("validation", losses[19::20])):
            drawn = picture.data(name)
            self.assertEqual(len(drawn), len(points))
            for (step, loss), (x, y) in zip(points, drawn):
                self.assertAlmostEqual(x, step, delta=0.1)
                self.assertAlmostEqual(y, loss, delta=0.005)

    def test_the_mean_is_smooth_and_lags_nowhere(self):
        wild = lambda curve: sum(abs(b - a) for (_, a), (_, b) in zip(curve, curve[1:]))
        picture = self.draw(noisy(1000))
        self.assertLess(wild(picture.data("mean")), wild(picture.data("loss")) / 5)
        line = self.draw([(i, i / 100) for i in range(1, 601)]).data("mean")
        for step, mean in line[10:-10]:
            self.assertAlmostEqual(mean, step / 100, delta=0.02)

    def test_a_giant_spike_leaves_the_rest_readable(self):
        for place in (0, 1, 500, 998, 999):
            losses = noisy(1000)
            losses[place] = place + 1, 1e6
            picture = self.draw(losses)
            heights = sorted(y for _, y in picture.curves["loss"])
            self.assertEqual(picture.curves["loss"][place][1], heights[0])  # along the upper edge
            self.assertGreater(heights[-1] - heights[1], 50)

    def test_what_is_not_finite_is_left_out(self):
        for value in (math.nan, math.inf, -math.inf):
            picture = self.draw(noisy(300) + [(301, value)], [(100, 2.5), (200, value), (300, 2.4)])
            self.assertEqual([len(picture.curves[name]) for name in ("loss", "mean", "validation")], [300, 300, 2])

    def test_a_hundred_thousand_steps(self):
        many = noisy(100_000)
        picture = self.draw(many, many)
        for name in picture.curves:
            self.assertAlmostEqual(picture.data(name)[0][0], 1, delta=200)
            self.assertAlmostEqual(picture.data(name)[-1][0], 100_000, delta=200)

    def test_the_command_line_draws_its_losses(self):
        flags = "--steps 30 --lr 0.02 --val-fraction 0.4 --eval-every 7 --div-warn 1e9 --samples 0 --plot run.svg"
        self.file("run.svg", "of another run")
        numbers = list(map(float, losses(self.printed(flags))))
        picture = Picture(self.content("run.svg").decode())
        self.assertEqual([len(points) for points in picture.curves.values()], [30, 30, 5])
        for (x, y), (step, loss) in zip(picture.data("loss"), enumerate(numbers, 1)):
            self.assertAlmostEqual(x, step, delta=0.1)
            self.assertAlmostEqual(y, loss, delta=0.01)
        self.assertEqual(sorted(os.listdir()), ["input.txt", "run.svg"])

    def test_a_run_that_ends_early_is_drawn_too(self):
        status, out, _ = self.main(*"--optimizer sgd --lr 1e300 --plot run.svg".split())
        self.assertEqual(status, 1)
        picture = Picture(self.content("run.svg").decode())
        self.assertEqual(len(picture.curves["loss"]), len(losses(out)) - 1)


class TestTrace(Commands):
    def test_its_numbers_are_those_of_the_run(self):
        flags = "--steps 12 --batch-size 3 --warmup-steps 4 --seed 7 --samples 0 --trace run.jsonl"
        self.file("run.jsonl", '{"step": 1, "of": "another run"}\n')
        out, lines = self.printed(flags), self.trace()
        self.assertEqual(losses(out), [f"{line['loss']:.4f}" for line in lines])
        docs = microgpt.read_documents("input.txt")
        tokenizer = CharTokenizer(docs)
        random.Random(7).shuffle(docs)
        for step, line in enumerate(lines):
            batch = [docs[(3 * step + i) % 5] for i in range(3)]
            self.assertEqual((line["step"], line["documents"]), (step + 1, batch))
            self.assertEqual(line["tokens"], [[tokenizer.bos, *tokenizer.encode(doc), tokenizer.bos] for doc in batch])
            self.assertAlmostEqual(line["learning_rate"], 0.01 * min((step + 1) / 4, 1 - (step - 4) / 8), 15)

    def test_the_gradients_are_those_of_the_first_step_before_clipping(self):
        self.printed("--steps 0 --samples 0 --save run")
        self.printed("--steps 2 --samples 0 --clip-grad 0.1 --trace run.jsonl")
        (first, second), weights = self.trace(), self.weights()
        config = Config(len(weights["wte"]))
        loss, grads = microgpt.loss_and_grads(config, weights, first["tokens"])
        squares = {name: sum(g * g for g in flat(rows)) for name, rows in grads.items()}
        self.assertAlmostEqual(first["loss"], loss, 12)
        self.assertAlmostEqual(first["gradient_norm"] ** 2, sum(squares.values()), 12)
        self.assertEqual(list(first["gradient_squares"]), list(squares))
        for name, square in squares.items():
            self.assertAlmostEqual(first["gradient_squares"][name], square, 12)
        self.assertNotIn("gradient_squares", second)

    def test_a_resumed_run_goes_on_after_its_step_and_cuts_what_is_beyond(self):
        flags = "--samples 0 --schedule constant --batch-size 2 --trace"
        self.printed(f"--steps 9 {flags} whole.jsonl")
        whole = self.content("whole.jsonl")
        self.printed(f"--steps 4 {flags} run.jsonl --save run")
        four, checkpoint = self.content("run.jsonl"), self.content("run")
        self.assertEqual(four, whole[: len(four)])
        lines = whole.splitlines(True)
        beyond = b"".join(lines[4:6]).replace(b'"loss"', b'"lost"')
        for rest in (b"", beyond, lines[4][:40], beyond + lines[6][:-1], beyond + b'{"st', b"\xff\x00"):
            self.file("run.jsonl", four + rest)
            self.file("run", checkpoint)
            self.printed(f"--resume run --steps 9 {flags} run.jsonl")
            self.assertEqual(self.content("run.jsonl"), whole, rest)
        for name, before in (("torn", four[:-1]), ("torn", four[:-9]), ("new", b"")):  # a disk was full in step 4
            self.file(f"{name}.jsonl", before)
            self.file("run", checkpoint)
            self.printed(f"--resume run --steps 9 {flags} {name}.jsonl")
            self.assertTrue(self.content(f"{name}.jsonl").endswith(whole[len(four) :]))
            self.assertEqual([line["step"] for line in self.trace(f"{name}.jsonl")][-5:], [5, 6, 7, 8, 9])

    def test_each_line_is_there_when_its_step_is_done(self):
        command = [sys.executable, "-u", SCRIPT, "--steps", "1000000", "--trace", "run.jsonl"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            shown = b""
            while b"step   20" not in shown:
                shown += process.stdout.read1(1000)
            process.kill()
        self.assertEqual([json.loads(line)["step"] for line in self.content("run.jsonl").splitlines()[:19]],
                         [*range(1, 20)])

    def test_no_file_is_left_open(self):
        flags = "--steps 4 --samples 0 --val-fraction 0.2 --div-warn 99 --plot a.svg --trace a.jsonl --save run"
        done = self.run_script(SCRIPT, *flags.split(), script="-Wdefault")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @needs_posix
    def test_a_full_disk_ends_the_run_and_keeps_its_checkpoint(self):
        import resource

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        flags = "--schedule constant --batch-size 20 --d-model 4 --context 8 --samples 0 --save".split()
        done = self.run_script(*flags, "run", "--trace", "run.jsonl", "--steps", "1000000", preexec_fn=limit)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        line = r"^microgpt: error: cannot write run.jsonl: File too large; step (\d+) is saved in run\n$"
        self.assertRegex(done.stderr, line)
        self.printed(f"--steps {re.match(line, done.stderr)[1]}", *flags, "same")
        self.assertEqual(*(microgpt.read_safetensors(name)[0] for name in ("run", "same")))


# 18. The command line -------------------------------------------------------------------------------------


class TestPrompts(Commands):
    def test_tokens_come_as_often_as_softmax_says(self):
        rng, z, n = random.Random(6), [0.0, 1.0, -2.0, 0.5], 20000
        for temperature in (0.5, 1.0, 2.0):
            exps = [math.exp(a / temperature) for a in z]
            drawn = [microgpt.draw(z, temperature, 0, rng) for _ in range(n)]
            for i, e in enumerate(exps):
                p = e / sum(exps)
                self.assertLess(abs(drawn.count(i) / n - p), 5 * math.sqrt(p * (1 - p) / n))

    def test_top_k_leaves_the_k_likeliest_and_their_equals(self):
        rng, everyone = random.Random(6), {0, 1, 2, 3}
        for k, left in ((1, {1}), (2, {0, 1, 2}), (3, {0, 1, 2}), (4, everyone), (9, everyone), (0, everyone)):
            self.assertEqual({microgpt.draw([1.0, 2.0, 1.0, 0.0], 3.0, k, rng) for _ in range(500)}, left)

    def test_temperature_0_is_the_likeliest_and_tiny_ones_do_not_overflow(self):
        self.assertEqual(microgpt.draw([0.0, 3.0, 2.9], 0, 0, None), 1)
        self.assertEqual(microgpt.draw([1e300, -1e300, 0.0], 1e-300, 0, random.Random(1)), 0)

    def samples(self, flags, *more):
        return re.findall("^sample +[0-9]+: (.*)$", self.printed(f"--steps 1 --samples 4 {flags}", *more), re.M)

    def test_prompts_top_k_temperature_and_max_tokens_reach_the_samples(self):
        plain = self.samples("")
        self.assertEqual([len(set(self.samples(flags))) for flags in ("--top-k 1", "--temperature 0")], [1, 1])
        for flags in ("--temperature 2", "--top-k 3", "--max-tokens 2", "--prompt em"):
            self.assertNotEqual(self.samples(flags), plain)
        self.assertEqual(self.samples("--top-k 9999 --temperature 0.5"), plain)
        out = self.printed("--steps 60 --samples 1 --stream --context 8 --max-tokens 40 --prompt em")
        self.assertRegex(out.split("sample  1: ")[1], "(?s)^em.{40}\n$")
        for text in self.samples("--prompt em --max-tokens 3"):
            self.assertRegex(text, "^em.{0,3}$")
        lengths = list(map(len, self.samples("--temperature 1000")))
        self.assertTrue(max(lengths) <= 16 and min(lengths) < 16, lengths)  # up to the context, or to BOS

    def test_past_the_context_the_window_slides_as_a_recomputation_does(self):
        self.file("text.txt", "abcabdaecb\n" * 9)
        chars = sorted("\nabcde")
        for size in (1, 5, 6):
            train = f"--corpus text.txt --stream --context {size} --steps 30 --lr 0.3 --samples 0 --save run{size}"
            self.printed(train)
            for prompt in ("ab", "abcabdaecbd", "edcba"):
                out = self.printed(f"--resume run{size} --max-tokens 20 --samples 1 --temperature 0 --prompt {prompt}")
                past, start = [chars.index(char) for char in prompt], 0  # where the window begins
                for _ in range(20):
                    if len(past) - start > size:
                        start = len(past) - (size + 1) // 2
                    p = by_hand(self.weights(f"run{size}"), past[start:], 1, 4)[0][-1]
                    past.append(p.index(max(p)))
                self.assertEqual(out.split("sample  1: ")[1], "".join(chars[i] for i in past) + "\n")

    def test_a_text_without_a_prompt_begins_as_after_a_line(self):
        for corpus, first in (("b\n\ta\nb", "\n"), ("bcb", "b")):
            self.file("text.txt", corpus * 9)
            flags = "--corpus text.txt --stream --context 4 --steps 40 --lr 0.05 --temperature 0 --samples 1"
            texts = [self.printed(flags, f"--prompt={prompt}").split("sample  1: ")[1] for prompt in ("", first)]
            self.assertEqual(first + texts[0], texts[1])


class TestCorpus(Commands):
    def test_globs_are_merged_sorted_and_each_file_is_read_once(self):
        os.makedirs("deep/er")
        for name, text in (("a.txt", "x\ny\n"), ("b.txt", "z\n"), ("deep/er/c.txt", "w\nv\n")):
            self.file(name, text)
        runs = [self.printed("--steps 9 --samples 2", *[f"--corpus={glob}" for glob in globs])
                for globs in (["b.txt", "./a.txt", "?.txt", "a.txt"], ["[ab].txt"], ["**/*.txt"])]
        self.assertTrue(runs[0].startswith("num docs: 3\nvocab size: 4\n"), runs[0])
        self.assertEqual(runs[0], runs[1])
        self.assertTrue(runs[2].startswith("num docs: 10\n"), runs[2])

    def test_names_of_odd_characters(self):
        self.file("a1b.txt", "matches, but is not meant")
        for i, name in enumerate(("it's a\n'name'.txt", "a[1]*.txt", "é☃.txt", "-x.txt", "%s {}.txt"), 1):
            self.file(name, "ab\n" * i)
            for flags in ([f"--corpus={name}", f"--save={name}s"], [f"--resume={name}s"]):
                self.assertIn(f"num docs: {i}\n", self.printed("--steps 1 --samples 1", *flags))

    def test_a_stream_is_the_text_as_it_is_and_documents_are_its_lines(self):
        self.file("a.txt", "\ufeffone\r\n\r\n two \n")
        for flags, first in (("", "num docs: 2\nvocab size: 6\n"), ("--stream", "num docs: 1\nvocab size: 8\n")):
            self.assertIn(first, self.printed(f"--corpus a.txt --context 4 --steps 1 --samples 0 {flags}"))
        self.file("b.txt", "34")
        self.printed("--corpus a.txt --corpus b.txt --stream --context 12 --steps 1 --samples 0 --trace run.jsonl")
        self.assertEqual(self.trace()[0]["documents"], ["one\n\n two \n34"])

    def test_windows_of_a_stream_depend_on_the_seed_and_the_step_and_come_from_all_of_it(self):
        self.file("text.txt", "abcdefghijklmnopqrstuvwxyz")
        run = "--corpus text.txt --stream --context 4 --samples 0 --batch-size 8 --trace run.jsonl --steps"
        windows = []
        for flags in ("20", "20", "10", "20 --seed 7"):
            self.printed(f"{run} {flags}")
            windows.append([window for line in self.trace() for window in line["documents"]])
        self.assertEqual((windows[0], windows[0][:80]), (windows[1], windows[2]))
        self.assertNotEqual(windows[0], windows[3])
        self.assertEqual(set(windows[0]), {"abcdefghijklmnopqrstuvwxyz"[i : i + 5] for i in range(22)})

    @unittest.skipUnless(os.path.exists("/dev/stdin"), "needs /dev/stdin")
    def test_a_pipe_is_a_corpus(self):
        done = self.run_script("--corpus", "/dev/stdin", "--steps", "1", "--samples", "0", stdin=None, input=b"ab\nc\n")
        self.assertEqual((done.returncode, done.stderr, done.stdout[:12]), (0, "", "num docs: 2\n"))

    def test_input_txt_is_that_of_the_current_folder_or_the_shipped_one(self):
        self.assertIn("num docs: 5\n", self.printed("--steps 1 --samples 0"))
        os.remove("input.txt")
        self.assertRegex(self.printed("--steps 1 --samples 1"), r"^num docs: \d{4,}\nvocab size: 27\n")
        done = self.run_script(script=shutil.copy(SCRIPT, "alone.py"))  # now there is none beside it either
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
        self.assertRegex(done.stderr, "^microgpt: error: .*input.txt")
        self.assertEqual(os.listdir(), ["alone.py"])

    @unittest.skipIf(not hasattr(os, "geteuid") or os.geteuid() == 0, "root may read everything, Windows has no modes")
    def test_a_file_that_may_not_be_read(self):
        os.chmod("input.txt", 0)
        self.assertRefused(1, "cannot read input.txt")


class TestValidation(Commands):
    def loss_by_hand(self, batch):
        """The mean loss over all tokens of a batch but the first of each, by the weights in the checkpoint."""
        weights, logs = self.weights(), []
        for ids in batch:
            logs += [-math.log(p[target]) for p, target in zip(by_hand(weights, ids[:-1], 1, 4)[0], ids[1:])]
        return sum(logs) / len(logs)

    def test_held_out_documents_are_never_trained_on_and_validation_is_the_mean_over_their_tokens(self):
        docs = ["a", "bc", "cab" * 9, "bbbb", "ccccab" * 3, "ab", "acab", "cc", "aab", "abcabcabcabcabcabc"]
        self.file("input.txt", "\n".join(docs))
        for fraction, n in ((0.3, 3), (0.01, 1), (0.9, 9)):
            out = self.printed(f"--steps 20 --batch-size 2 --val-fraction {fraction} --eval-every 20 --div-warn 1e9 "
                               "--samples 0 --save run --trace run.jsonl")
            trained = {doc for line in self.trace() for doc in line["documents"]}
            held_out = [doc for doc in docs if doc[:16] not in {doc[:16] for doc in trained}]
            self.assertEqual((len(trained), len(held_out)), (10 - n, n))
            self.assertIn(f"num docs: {10 - n}\n", out)
            batch = [[3, *("abc".index(char) for char in doc), 3][:17] for doc in held_out]
            self.assertEqual(f"{self.loss_by_hand(batch):.4f}", re.search(r"validation (\S+)\n", out)[1])
            os.remove("run")

    def test_the_end_of_a_stream_is_held_out_in_windows(self):
        text = "".join(random.Random(1).choices("abc", k=110)) + "d" * 10
        self.file("text.txt", text)
        out = self.printed("--corpus text.txt --stream --context 4 --steps 30 --val-fraction 0.2 --eval-every 30 "
                           "--div-warn 1e9 --samples 0 --save run --batch-size 8 --trace run.jsonl")
        self.assertNotIn("d", "".join(doc for line in self.trace() for doc in line["documents"]))
        ids = ["abcd".index(char) for char in text[96:]]
        batch = [ids[start : start + 5] for start in range(0, 23, 4)]
        self.assertEqual(f"{self.loss_by_hand(batch):.4f}", re.search(r"validation (\S+)\n", out)[1])

    def test_the_loss_beside_it_is_the_mean_since_the_one_before(self):
        out = self.printed("--steps 7 --eval-every 3 --val-fraction 0.2 --div-warn 1e9 --samples 0")
        each, told = list(map(float, losses(out))), re.findall(r"loss (\S+) on average", out)
        self.assertEqual(re.findall(r"step +(\d) / +7 \| loss \S+ on", out), ["3", "6", "7"])
        for mean, part in zip(told, (each[:3], each[3:6], each[6:])):
            self.assertAlmostEqual(float(mean), statistics.mean(part), delta=1.01e-4)

    def test_the_gap_that_warns_and_the_gap_that_stops(self):
        flags = "--corpus text.txt --stream --steps 30 --eval-every 30 --lr 0.03 --samples 0 --seed"
        for text, seed, large in (("a" * 400 + "abc" * 60, 2, False), ("aab" * 100 + "abb" * 12, 1, True)):
            self.file("text.txt", text)
            _, out, errors = self.main(*f"{flags} {seed} --div-warn 0".split())
            loss, validation = map(float, re.search(r"loss (\S+) on average \| validation (\S+)\n", out).groups())
            gap = int(re.search(r"at step 30 the validation loss is (\d+) % above the training loss\n$", errors)[1])
            self.assertAlmostEqual(gap, (validation / loss - 1) * 100, delta=0.6)
            self.assertEqual(gap > 20, large)
            for more, status, word in (
                ("--val-fraction 0.1", 0, "warning" if large else ""), (f"--div-warn {gap - 1}", 0, "warning"),
                (f"--div-warn {gap + 1}", 0, ""), (f"--div-crit {gap - 1} --save run", 1, "error"),
                (f"--div-crit {gap + 1} --div-warn {gap + 1}", 0, ""),
                (f"--div-crit {gap + 1} --div-warn {gap - 1}", 0, "warning"),
            ):
                got, _, errors = self.main(*f"{flags} {seed} {more}".split())
                self.assertEqual((got, errors.count("\n")), (status, word != ""), more)
                self.assertRegex(errors, f"^microgpt: {word}: at step 30 " if word else "^$")
                self.assertEqual("; step 30 is saved in run\n" in errors, word == "error")

    def test_watching_changes_neither_the_losses_nor_the_last_samples(self):
        watching = "--gen-every 5 --save-every 3 --save run --trace run.jsonl --plot run.svg"
        plain, watched = (self.printed(f"--steps 12 --samples 3 {flags}") for flags in ("", watching))
        self.assertEqual(losses(plain), losses(watched))
        self.assertEqual(len(re.findall(r"^sample at step (5|10): ", watched, re.M)), 2)
        self.assertEqual(*(out[out.index("--- inference") :] for out in (plain, watched)))
        flags = "--steps 12 --val-fraction 0.2 --stream --context 4 --div-warn 1e9 --eval-every"
        self.assertEqual(*(losses(self.printed(f"{flags} {n}")) for n in (3, 12)))


class TestCommandLine(Commands):
    @unittest.skipUnless(os.path.exists(NAMES), "needs the reference's names in ../shared/names.txt")
    def test_the_default_run_prints_what_the_reference_prints(self):
        shutil.copy(NAMES, "input.txt")
        done = self.run_script()
        with open(GOLDEN, encoding="utf-8") as file:
            self.assertEqual(done.stdout.replace("\r\n", "\n").replace("\r", "\n"), file.read())
        self.assertEqual((done.stderr, done.returncode, done.stdout.count("\r")), ("", 0, 1000))

    def test_the_engines_and_archs_print_the_same(self):
        for arch in microgpt.MODELS:
            flags = f"--steps 5 --batch-size 2 --layers 2 --d-model 8 --heads 2 --context 5 --samples 3 --arch {arch}"
            self.assertEqual(*(self.printed(f"{flags} --engine {engine}") for engine in ("scalar", "tensor")))

    def test_every_flag_changes_the_run_and_a_seed_repeats_it(self):
        runs = [self.printed(f"--steps 6 --samples 2 --val-fraction 0.2 --div-warn 1e9 {flags}") for flags in (
            "", "--stream --context 8", "--vocab-size 1", "--layers 2", "--d-model 8", "--heads 2", "--context 4",
            "--arch gpt2", "--steps 5", "--batch-size 2", "--optimizer sgd", "--optimizer momentum",
            "--optimizer rmsprop", "--optimizer adamw --weight-decay 0.5", "--lr 0.1", "--beta1 0.1", "--beta2 0.1",
            "--eps 0.1", "--cosine", "--schedule constant", "--warmup-steps 3", "--clip-grad 0.1", "--seed 7",
            "--val-fraction 0.4", "--eval-every 4", "--gen-every 4", "--temperature 2", "--top-k 2", "--prompt m",
            "--max-tokens 3", "--samples 3")]
        self.assertEqual(len(set(runs)), len(runs))
        self.assertEqual(self.printed("--steps 6 --samples 2 --val-fraction 0.2 --div-warn 1e9 --seed 42"), runs[0])

    def test_both_spellings_of_a_flag(self):
        for first, second in (
            ("--layers 2 --d-model 8 --heads 2 --context 5 --vocab-size 1",
             "--n-layer 2 --n-embd 8 --n-head 2 --block-size 5 --merges 1"),
            ("--schedule cosine", "--cosine"), ("--schedule linear", "--cosine --schedule linear"),
            ("", "--clip-grad 0"), ("", "--clip-grad 0.1 --no-clip-grad"),
        ):
            self.assertEqual(*(self.printed(f"--steps 4 --samples 2 {flags}") for flags in (first, second)))
        self.assertEqual(microgpt.parse_args(["--vulkan"])[0].engine, "vulkan")

    def test_the_long_command_line_of_the_design_and_going_on_with_it(self):
        flags = '--corpus "corpus/*.txt" --stream --steps 50000 --vocab-size 1000 --warmup-steps 500 --cosine ' \
                "--div-crit 50 --gen-every 500 --vulkan"
        args, _ = microgpt.parse_args(shlex.split(flags))
        self.assertEqual((args.corpus, args.steps, args.vocab_size, args.schedule, args.engine, args.val_fraction),
                         (["corpus/*.txt"], 50000, 1000, "cosine", "vulkan", 0.1))
        os.mkdir("corpus")
        with open(os.path.join(HERE, "input.txt"), encoding="utf-8") as file:
            self.file("corpus/a.txt", file.read(2000))
        flags = flags.replace("50000", "6").replace("500", "3") + " --samples 1 --save run"
        flags = flags if count_devices() else flags.replace(" --vulkan", "")
        note = "^microgpt: note: after [0-9]+ merges no pair of tokens occurs twice\n$"
        for flags, steps in ((flags, "123456"), ("--resume run --steps 9", "789")):
            done = self.run_script(*shlex.split(flags))
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertRegex(done.stderr, note)
            self.assertEqual(re.findall(r"step +(\d) / +\d \| loss \S+\r", done.stdout), list(steps))
            self.assertIn(f"\nsample at step {steps[-1]}: ", done.stdout)
            self.assertIn("--- inference (new, hallucinated text) ---\nsample  1: ", done.stdout)
            note = "^$"

    def test_help_names_every_group_and_the_defaults_that_the_parser_has(self):
        done = self.run_script("--help", env={"COLUMNS": "300"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for group in ("data:", "model:", "training:", "watching:", "keeping:", "sampling:", "engine:"):
            self.assertIn("\n" + group + "\n", done.stdout)
        self.assertNotRegex(done.stdout, "object at|None|%%")
        args, told = vars(microgpt.parse_args([])[0]), {}
        text = re.sub(r"\n {9,}", "  ", done.stdout)  # what stands below a long flag
        for names, default in re.findall(r"^  (--.*?)  +[^-].*?(?: \(([^()]*)\))?$", text, re.M):
            told[re.match("--([a-z0-9-]+)", names)[1].replace("-", "_")] = default
        self.assertGreaterEqual(set(told), set(args))
        for name, value in args.items():
            if value not in (None, False, ""):
                self.assertEqual(type(value)(told[name]), value, name)
        self.assertIn("% above training (20)", text)

    def test_what_is_refused(self):
        self.file("empty.txt", "")
        self.file("blank.txt", "\n  \n\r\n\t\n")
        self.file("latin.txt", b"caf\xe9\n")
        self.file("short.txt", "ab")
        self.file("5.txt", "abcde")
        os.makedirs("folder.svg")
        os.makedirs("folder.jsonl")
        sizes = "--layers --d-model --heads --context --batch-size --max-tokens --workers --save-every".split()
        names = "--arch --engine --optimizer --schedule".split()
        for status, pattern, flags in (
            (1, "cannot read missing.txt", "--corpus missing.txt"),
            (1, r"cannot read nothing-\*.txt", "--corpus nothing-*.txt"),
            (1, "too little text in empty.txt$", "--corpus empty.txt"),
            (1, "too little text in empty.txt$", "--corpus empty.txt --stream"),
            (1, "too little text in blank.txt$", "--corpus blank.txt"),
            (1, "cannot read latin.txt: 'utf-8' codec can't decode byte 0xe9", "--corpus latin.txt"),
            (1, "cannot read folder.svg", "--corpus folder.svg"),
            (1, "too short for a context of 16", "--corpus short.txt --stream"),
            (1, "too little text in short.txt$", "--corpus short.txt --val-fraction 0.1"),
            (1, "too short for a context of 2", "--corpus 5.txt --stream --context 2 --val-fraction 0.1"),
            *[(1, "cannot read /dev/zero", "--corpus /dev/zero")] * os.path.exists("/dev/zero"),
            (1, "the character 'É'", "--prompt É"),
            (1, "the character 'x'", "--explain x"),
            (2, "--heads 3 does not divide --d-model 16", "--heads 3"),
            (2, "unrecognized arguments: --nonsense", "--nonsense"),
            (2, "unrecognized arguments: --temp", "--temp 1"),
            (2, "unrecognized arguments: word", "word"),
            (2, "expected one argument", "--steps"),
            *[(2, f"{flag}\\b.*whole number from 1.*'{value}'", f"{flag}={value}")
              for flag in sizes for value in ("0", "-1", "x", "1.5", "")],
            *[(2, f"{flag}\\b.*number from 0", f"{flag}={value}") for value in ("-1", "nan", "inf", "x", "")
              for flag in "--lr --temperature --clip-grad --weight-decay --div-warn --div-crit".split()],
            *[(2, f"{flag}\\b.*from 0 to below 1", f"{flag}={value}") for value in ("-1", "1", "nan")
              for flag in "--beta1 --beta2 --val-fraction".split()],
            (2, "--eps", "--eps 0"),
            (2, "--warmup-steps", "--warmup-steps -1"),
            (2, "--workers 2 .*--batch-size 1", "--workers 2"),
            *[(2, f"{flag}.*invalid choice", f"{flag} gpt5") for flag in names],
            (2, "more than a billion weights", "--d-model 99999 --heads 1"),
            (2, "more than a billion weights", "--layers 999999"),
            (2, "more than a billion weights", "--context 999999999"),
            (2, "--steps", "--steps " + "9" * 400),
            (2, "--steps", "--steps " + "9" * 5000),
            (2, "--vocab-size", "--vocab-size 99999999"),
            *[(2, "--batch-sizes", f"--autotune --batch-sizes={list}") for list in ("0", "a", "1,,2", "", "1.5", "-1")],
            (2, "nothing to try", "--autotune --batch-sizes=1,2 --worker-counts=4"),
            (2, "--plot", "--plot input.txt"), (2, "--trace", "--trace run.svg"), (2, "--plot", "--plot="),
            (2, "--plot", "--plot folder.svg"), (2, "--trace", "--trace folder.jsonl"), (1, r"cannot read \.", "--save ."),
            (2, "--save", "--save="), (1, "input.txt", "--save input.txt"), (1, "missing", "--resume missing"),
            (1, "input.txt", "--resume input.txt"), (1, "''|cannot read", "--resume="),
            *[(1, "cannot save nowhere/a", f"{flag} nowhere/a{end}")
              for flag, end in (("--save", ""), ("--plot", ".svg"), ("--trace", ".jsonl"))],
        ):
            with self.subTest(flags=flags[:50]):
                self.assertRefused(status, pattern, *flags.split())
        for flags in ("--lr", "--save-every", "--arch", "--nonsense", "--resume", "--corpus", "--plot"):
            status, _, errors = self.main(flags, "7" * 5000)  # at most 100 characters are quoted
            self.assertEqual((status in (1, 2), errors.count("\n"), "7" * 101 in errors), (True, 1, False), flags)
        self.assertRefused(1, "cannot read no such", "--corpus", "no\nsuch")
        self.assertRefused(2, "unrecognized arguments: --a b", "--a\nb")
        self.assertEqual(len(os.listdir()), 8)  # and nothing was written
        done = self.run_script("--heads", "3")  # as a process
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (2, "", "microgpt: error: --heads 3 does not divide --d-model 16\n"))

    def test_what_ends_a_run(self):
        for pattern, flags in (("the loss of step [23] is (nan|inf)", "--lr 1e300"),
                               ("overflowed", "--lr 1e308 --steps 1"),
                               ("overflowed", "--lr 1e308 --steps 1 --samples 0 --explain emma"),
                               ("two tokens", "--stream --context 4 --steps 1 --explain e")):
            status, _, errors = self.main(*flags.split())
            self.assertEqual((status, errors.count("\n")), (1, 1), errors)
            self.assertRegex(errors, f"^microgpt: error: .*{pattern}")

    def test_a_gpu_that_is_lost_leaves_a_checkpoint(self):
        driver = self.driver("""import types
def offload(gpu, plain, calls=iter(range(200))):
    def matmuls(*args):
        if next(calls, None) is None:
            raise vulkan_gemm.VulkanError("the device is lost")
        return plain(*args)
    return matmuls
vulkan_gemm.offload, vulkan_gemm.VulkanGemm = offload, lambda: types.SimpleNamespace(close=lambda: None)
sys.exit(microgpt.main())
""")
        flags = "--schedule constant --samples 0 --save"
        done = self.run_script("--vulkan", *flags.split(), "run", script=driver)
        line = r"^microgpt: error: the device is lost; step (\d+) is saved in run\n$"
        self.assertRegex(done.stderr, line)
        self.printed(f"{flags} same --steps {re.match(line, done.stderr)[1]}")
        self.assertEqual(self.weights("same"), self.weights())

    def test_main_leaves_the_process_as_it_was_and_works_in_any_thread(self):
        handlers, got = {number: signal.getsignal(number) for number in STOPS}, []
        for collect in (gc.disable, gc.enable):
            collect()
            before = gc.isenabled()
            for flags in (["--steps", "1", "--samples", "1"], ["--nonsense"]):
                self.main(*flags)
                self.assertEqual({number: signal.getsignal(number) for number in STOPS}, handlers)
                self.assertEqual(gc.isenabled(), before)
        thread = threading.Thread(target=lambda: got.append(self.main("--steps", "2", "--samples", "1")))
        thread.start()
        thread.join()
        self.assertEqual(got, [self.main("--steps", "2", "--samples", "1")])
        self.assertEqual((got[0][0], got[0][2]), (0, ""))

    @needs_posix
    def test_memory_does_not_grow_with_the_steps(self):
        driver = self.driver("import resource\nstatus = microgpt.main()\n"
                             "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 * (sys.platform == 'darwin'))")
        flags = "--engine scalar --d-model 4 --context 8 --samples 0 --steps".split()
        few, many = (int(self.run_script(*flags, n, script=driver).stdout.split()[-1]) for n in ("50", "400"))
        self.assertLess(many - few, 80_000)  # kB

    def test_importing_runs_nothing(self):
        done = self.run_script("-c", "import microgpt", script="-B", env={"PYTHONPATH": os.path.dirname(SCRIPT)})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_text_that_the_terminal_cannot_show(self):
        self.file("input.txt", "é😀\n")
        for more in ([], ["--prompt", "☃"]):
            done = self.run_script("--steps", "1", *more, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
            self.assertEqual((done.returncode, done.stderr.count("\n")), (bool(more), bool(more)), done.stderr)
            self.assertNotIn("Traceback", done.stderr)


@needs_posix
class TestTerminal(Commands):
    """The command line as a process, and what becomes of its output."""

    def test_progress_and_ctrl_c_are_told_on_a_terminal_alone(self):
        terminal, end = os.openpty()
        self.addCleanup(os.close, terminal)
        command, shown = [sys.executable, SCRIPT, "--steps", "1000000", "--plot", "run.svg"], b""
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out, stderr=end) as process:
            os.close(end)
            self.addCleanup(process.kill)
            while not re.search(rb"\d steps/s, \d+:\d\d left", shown):
                shown += os.read(terminal, 10000)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # nobody is at the other end any more
                while True:
                    more = os.read(terminal, 10000)
                    if not more:
                        break
                    shown += more
            self.assertEqual(process.wait(), 130)
            out.seek(0)
            self.assertNotIn(b"steps/s", out.read())
        lines = shown.decode().splitlines()
        self.assertIn("microgpt: finishing this step; a second time ends at once", lines)
        self.assertEqual(lines[-1], "microgpt: interrupted: nothing was saved")
        self.assertGreater(len(Picture(self.content("run.svg").decode()).curves["loss"]), 0)

    def test_a_closed_pipe_ends_it_quietly(self):
        command = [sys.executable, SCRIPT, "--steps", "100000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.read(10)
            process.stdout.close()
            self.assertEqual((process.stderr.read(), process.wait()), (b"", 1))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_behind_the_output_is_one_line(self):
        for unbuffered in ("", "1"):
            settings = {"env": {"PYTHONUNBUFFERED": unbuffered}}
            with open("/dev/full", "w") as full:
                done = self.run_script("--steps", "1", stdout=full, **settings)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, "^microgpt: error: cannot write the output: [^\n]*\n$")
            reader, writer = os.pipe()
            os.close(reader)
            for flags in (["--help"], ["--prompt", "9"]):
                done = self.run_script(*flags, stdout=writer, **settings)
                self.assertIn((done.returncode, done.stderr), ((0, ""), (1, "")), flags)
            os.close(writer)

    def test_output_that_is_closed_from_the_start(self):
        for closed, flags, status, errors in ((">&-", "--steps 2 --samples 1 --save run --trace run.jsonl", 0, 0),
                                              (">&-", "--nonsense", 2, 1), (">&-", "--help", 0, 0),
                                              ("2>&-", "--nonsense", 2, 0), (">&- 2>&-", "--steps 1", 0, 0)):
            command = f'"$0" "$@" {closed}', sys.executable, SCRIPT, *flags.split()
            done = self.run_script(*command, script="-c", executable="/bin/sh")
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", errors), closed)
            self.assertNotIn("Traceback", done.stderr)
        self.assertEqual([line["step"] for line in self.trace()], [1, 2])
        self.assertEqual(len(self.weights()), 9)


class TestAutotune(Commands):
    FLAGS = "--autotune --steps 1 --samples 1 --prompt a --batch-sizes 1,2 --worker-counts 1,2".split()

    def setUp(self):
        super().setUp()
        self.quick = self.driver("if __name__ == '__main__':\n"
                                 "    microgpt.autotune.__defaults__ = (0.3,)\n    sys.exit(microgpt.main())\n")

    def tune(self, *flags):
        """What a short --autotune prints: the rows of its table, and the flags in its last line."""
        done = self.run_script(*self.FLAGS, *flags, script=self.quick)
        self.assertEqual(done.returncode, 0, done.stderr)
        table, fastest = done.stdout.partition("tokens/s\n")[2].split("the fastest: ")
        return {tuple(row.split()[:2]): int(row.split()[2]) for row in table.splitlines()}, fastest.split()

    def test_it_tries_every_choice_and_ends_with_the_fastest(self):
        self.printed("--steps 1 --samples 0 --save run")
        before = self.content("run")
        speeds, fastest = self.tune("--save", "new")
        self.assertEqual(list(speeds), [("1", "1"), ("2", "1"), ("2", "2")])
        self.assertEqual(fastest[::2], ["--batch-size", "--workers"])
        self.assertEqual(speeds[tuple(fastest[1::2])], max(speeds.values()))
        done = self.run_script("--steps", "1", "--samples", "1", *fastest)  # as pasted
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.tune("--resume", "run", "--batch-sizes", "1", "--worker-counts", "1")
        self.assertEqual((self.content("run"), os.path.exists("new")), (before, False))

    @needs_posix
    def test_when_interrupted_it_has_printed_what_it_knows(self):
        command = [sys.executable, SCRIPT, *self.FLAGS, "--batch-sizes", "1,2,3,4,5,6,7,8,9"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            rows = [process.stdout.readline() for _ in range(5)]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        self.assertEqual(process.returncode, 130)
        self.assertRegex(rows[-1], rb"^ +1 +1 +\d+\n$")
        self.assertRegex(errors, rb"^microgpt: interrupted: nothing was saved\n$")


# README ---------------------------------------------------------------------------------------------------


def readme_commands():
    """Each command of the README as a list of words, and the lines that it shows below it."""
    with open(README, encoding="utf-8") as file:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", file.read().replace("\\\n", ""), re.M | re.S)
    for _, block in blocks:
        start = "$ python " if block.startswith("$") else "python "
        for part in block[len(start) :].split("\n" + start) if block.startswith(start) else ():
            command, _, shown = part.partition("\n")
            yield shlex.split(command, comments=True)[1:], shown.splitlines()


EXERCISES = {  # number -> edits of the source, flags
    1: ([], ["--heads 1", "--heads 1 --steps 4000 --eval-every 4000", "--steps 4000 --eval-every 4000"]),
    2: ([("x = x + found.linear(", "x = found.linear("), ("x = x + hidden.linear(", "x = hidden.linear(")],
        ["", "--layers 4"]),
    3: ([('+ w["wpe"].embed(positions)             #', '+ w["wpe"].embed([0] * len(ids))  #')],  # not that of gpt2()
        ["", "--steps 4000 --eval-every 4000"]),
    4: ([], ["--temperature 0.1", "--temperature 2"]),
    5: ([], ["--optimizer sgd", "--optimizer sgd --lr 0.3", "--optimizer sgd --lr 1"]),
    6: ([], ["--corpus microgpt.py --stream --context 64 --batch-size 4"]),
    7: ([], ["--val-fraction 0.99 --eval-every 4000 --steps 4000"]),
    8: ([("rng.shuffle(docs)\n    whole", "docs.sort()\n    whole")], [""]),
    9: ([("rng.gauss(0, 0.08)", "rng.gauss(0, 0.0)")], [""]),
    10: ([("probabilities(row[: past + t + 1])", "probabilities(row)"),
          ("ps.append([row + [0.0] * (length - t - 1) for t, row in enumerate(shares)])", "ps.append(shares)")], [""]),
}

# Each mistake of the porting section, in its order: what of part one is replaced, and by what.
MISTAKES = [
    [("add_up(losses) / len(losses)", "add_up(losses)")],
    [("tokenizer.encode(doc) + [tokenizer.bos]", "tokenizer.encode(doc)")],
    [("    x = x.rmsnorm()", "    x = x")],
    [(" / math.sqrt(size) for key in keys", " for key in keys")],
    [("(dot(row, row) / len(row) + 1e-5)", "(dot(row, row) / len(row))")],
    [(" / m_share", ""), (" / v_share", "")],
    [("(1.0 if self.data > 0 else 0.0,)", "(1.0,)")],
    [("(math.sqrt(v_hat) + eps)", "(math.sqrt(square[i]) + eps) * math.sqrt(v_share)")],
    [("(1 - step / steps)", "(1 - (step + 1) / steps)")],
    [("beta1=0.85", "beta1=0.9")],
    [("beta2=0.99", "beta2=0.999")],
    [("        adam(weights, grads,",
      "        total = grads if step == 0 else {name: [[a + b for a, b in zip(x, y)] "
      "for x, y in zip(total[name], rows)] for name, rows in grads.items()}\n        adam(weights, total,")],
]


@unittest.skipUnless(os.path.exists(README), "needs README.md beside the tests")
class TestReadme(Files):
    def setUp(self):
        super().setUp()
        for name in ("microgpt.py", "vulkan_gemm.py"):
            shutil.copy(os.path.join(os.path.dirname(SCRIPT), name), self.folder.name)
        shutil.copy(os.path.join(HERE, "input.txt"), self.folder.name)
        with open(README, encoding="utf-8") as file:
            self.readme = file.read()
        with open(SCRIPT, encoding="utf-8") as file:
            self.source = file.read()

    def section(self, title):
        return self.readme.split(f"\n## {title}\n")[1].split("\n## ")[0]

    def run_command(self, flags, *more):
        """The status of a command, and what it prints, in lines."""
        done = self.run_script(*flags, *more, script="microgpt.py")
        return done.returncode, (done.stdout + done.stderr).replace("\r", "\n").splitlines()

    def edited(self, edits, source):
        for old, new in edits:
            self.assertEqual(source.count(old), 1, old)
            source = source.replace(old, new)
        return source

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
        table, told = self.section("Flags").split("\n\n")[0], self.run_script("--help").stdout
        flags = set(re.findall(r"^  (?:-h, )?(--.*?)(?:  |$)", told, re.M))
        flags = set(re.findall(r"--[a-z][a-z0-9-]+", " ".join(flags))) - {"--help"}
        self.assertEqual(set(re.findall(r"--[a-z][a-z0-9-]+", table)), flags)

    def test_the_numbers_for_porting_are_those_of_the_shipped_names(self):
        status, lines = self.run_command("--explain emma --samples 5 --trace run.jsonl".split())
        self.assertEqual(status, 0)
        for line in self.section("What you see").split("```\n")[1].splitlines():
            self.assertIn(line, lines)
        explained = next(shown for flags, shown in readme_commands() if "--explain" in flags)
        self.assertEqual(explained, lines[-len(explained) :])
        trace, porting = [json.loads(line) for line in self.content("run.jsonl").splitlines()], self.section("Porting")
        rows = re.findall(r"^\| (\d+) \| (\w+) \| (\S+) \| (\S+) \|$", porting, re.M)
        self.assertEqual([int(row[0]) for row in rows], [*range(1, 11), 1000])
        for step, name, loss, norm in rows:
            line = trace[int(step) - 1]
            self.assertEqual([name], line["documents"])
            self.assertAlmostEqual(line["loss"], float(loss), 11)
            self.assertAlmostEqual(line["gradient_norm"], float(norm), 10)
        a, b = Value(2.0), Value(-3.0)
        y = ((a * b + a**2).exp() + 1).log() / b
        microgpt.backward(y)
        self.assertIn("y = log(exp(a * b + a ** 2) + 1) / b", " ".join(porting.split()))
        docs, rng = microgpt.read_documents("input.txt"), random.Random(42)
        rng.shuffle(docs)
        config = Config(CharTokenizer(docs).vocab_size)
        w = {name: Tensor.wrap(rows) for name, rows in microgpt.initial_weights(config, rng).items()}
        (first,) = microgpt.gpt(config, w, [26], [0], [microgpt.new_cache(config)]).data
        microgpt.tape.clear()
        wanted = [y.data, a.grad, b.grad, *first[:3], sum(first), trace[0]["loss"], trace[0]["gradient_norm"]]
        wanted += trace[0]["gradient_squares"].values()
        told = re.findall(r"-?\d+\.\d{6,}(?:e-\d+)?", porting.split("|---|---|\n")[1].split("\n\n")[0])
        self.assertEqual(len(told), len(wanted))
        for a, b in zip(map(float, told), wanted):
            self.assertAlmostEqual(a / b, 1, 9)
        samples = [line.split(": ")[1] for line in lines if line.startswith("sample")]
        self.assertIn("{}, {}, {}, {} and {}".format(*samples), " ".join(porting.split()))

    def test_a_mistake_in_a_port_shows_as_it_is_told(self):
        table = re.findall(r"^\| (\d) \| (\d+\.\d+) \| [^|]+ \|$", self.section("Porting"), re.M)
        self.assertEqual(len(table), len(MISTAKES))
        part_one = self.source[: self.source.index("# PART TWO")]
        right = self.first_losses(part_one)
        for (step, told), edits in zip(table, MISTAKES):
            losses = self.first_losses(self.edited(edits, part_one))
            self.assertEqual(f"{losses[int(step) - 1]:.{len(told.partition('.')[2])}f}", told, edits)
            self.assertEqual([a == b for a, b in zip(losses, right)].index(False), int(step) - 1)

    def first_losses(self, source):
        """The losses of three steps of the default run, by such a part one."""
        port, losses = types.ModuleType("port"), []
        sys.modules["port"] = port  # dataclasses look for it there
        self.addCleanup(sys.modules.pop, "port", None)
        exec(source, vars(port))
        loss_and_grads = port.loss_and_grads

        def recorded(*args):
            loss, grads = loss_and_grads(*args)
            losses.append(loss)
            if len(losses) == 3:
                raise StopIteration
            return loss, grads

        port.loss_and_grads = recorded
        with contextlib.suppress(StopIteration), contextlib.redirect_stdout(io.StringIO()):
            port.train_and_sample(os.path.join(HERE, "input.txt"))
        return losses

    def test_the_exercises_fit_the_source(self):
        items = re.split(r"^\d+\. ", self.section("Exercises"), flags=re.M)[1:]
        self.assertEqual(len(items), len(EXERCISES))
        for item, (edits, runs) in zip(items, EXERCISES.values()):
            self.file("microgpt.py", self.edited(edits, self.source))
            for _, new in edits:
                self.assertIn(re.split("\n|  #", new)[0], " ".join(item.split()))
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
            self.file("microgpt.py", self.edited(edits, self.source))
            for run in runs:
                flags = ["--val-fraction", "0.1", "--eval-every", "1000", "--samples", "5", *run.split()]
                pattern = r"validation (\d\S+)$|" + (r"^sample  \d: (.*)" if number == 4 else r"loss of (step \d+)")
                for line in self.run_command(flags)[1]:
                    for text in filter(None, itertools.chain(*re.findall(pattern, line))):
                        print(number, run, text, "-- as it says" if text in numbers else "-- OTHER")


# The benchmark --------------------------------------------------------------------------------------------
#
# Each row times a thing and another in turn, some rounds long, and gives the medians and the median of the ratios.
# A whole process is timed with little to do and with more; the difference is the cost of what there was more.

MEDIUM = "--layers 2 --d-model 64 --context 64"
WINDOWS = f"{MEDIUM} --stream --batch-size 8"


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(flags):
    """Run the command line on the reference's names if they are there. Returns what it prints."""
    names = NAMES if os.path.exists(NAMES) else os.path.join(HERE, "input.txt")
    command = [sys.executable, SCRIPT, "--corpus", names, *flags.split()]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()


def step(flags="", n=300):
    """A function that times a step of such a run, an average one of its first."""
    cost = lambda steps: seconds(lambda: run(f"--samples 0 {flags} --steps {steps}"))
    return lambda: (cost(n + 1) - cost(1)) / n


def yardstick():
    """A function that times a step of the reference, in the same way."""
    command = [sys.executable, YARDSTICK, NAMES]
    cost = lambda n: seconds(lambda: subprocess.run([*command, str(n), "1000"], stdout=subprocess.DEVNULL, check=True))
    return lambda: (cost(21) - cost(1)) / 20


def token(engine, samples):
    """A function that times a token that the default model samples."""
    flags = f"--engine {engine} --steps 0 --samples"
    tokens = sum(min(len(name) + 1, 16) for name in re.findall("sample +[0-9]+: (.*)", run(f"{flags} {samples}")))
    cost = lambda n: seconds(lambda: run(f"{flags} {n}"))
    return lambda: (cost(samples) - cost(0)) / tokens


def merges(learn):
    """A function that times the learning of 500 merges of 200 kB."""
    with open(SCRIPT, encoding="utf-8") as file:
        docs, new = characters([(file.read() * 4)[:200_000]])
    return lambda: seconds(lambda: learn(docs[:], 500, new))


def saving():
    """A function that times a checkpoint of the model of the rows on workers."""
    def checkpoint():
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "run")
            cost = lambda n: seconds(lambda: run(f"{MEDIUM} --samples 0 --steps 21 --save {path}{n} --save-every {n}"))
            return (cost(1) - cost(1000)) / 20

    return checkpoint


def square(n):
    """Functions that time a product of n x n matrices on the GPU and in plain Python."""
    gpu, a = vulkan_gemm.VulkanGemm(), normal(random.Random(1), n, n)
    return [lambda f=f: min(seconds(lambda: f([a], [a])) for _ in range(3)) for f in (gpu.matmuls, FastTensor.matmuls)]


BENCHMARKS = [  # what, against what, rounds, and what makes the two functions that time them
    ("a step", "the reference", 5, lambda: (step(), yardstick())),
    ("a step, `--engine scalar`", "the reference", 5, lambda: (step("--engine scalar", 20), yardstick())),
    ("a sampled token", "`--engine scalar`", 5, lambda: (token("tensor", 400), token("scalar", 40))),
    ("a step of 8 windows of 64, 2 layers of 64, `--workers 2`", "one process", 5,
     lambda: [step(f"{WINDOWS} --workers {n}", 2) for n in (2, 1)]),
    ("the same in one process with layers of 128, `--vulkan`", "plain Python", 3,
     lambda: [step(f"{WINDOWS} --d-model 128 --engine {name}", 1) for name in ("vulkan", "tensor")]),
    *[(f"a product of {n} x {n} as by `--vulkan`", "plain Python", 5, lambda n=n: square(n)) for n in (16, 64, 256)],
    ("500 merges of 200 kB", "a recount for each", 3, lambda: (merges(microgpt.learn_merges), merges(recount))),
    ("a checkpoint of 2 layers of 64", "a step", 5, lambda: (saving(), step(WINDOWS, 1))),
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
        if missing or "--vulkan" in what and not count_devices():
            print(f"| {i} | {what} | left out: {missing or 'no Vulkan device'} | | | |")
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
