#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tests and the benchmark of microgpt, in the order of the file's sections.

    python test_microgpt.py              run all tests
    python test_microgpt.py benchmark    print what things cost on this machine
    python test_microgpt.py readme       run everything that the README shows, as it stands there

Gradients are held against finite differences, the engines against each other and a computation by hand, and
the command line is run as a person runs it. Two things outside the repository are used if they are there, in
../shared: the reference's names and what it prints on them; the yardstick, which costs what it costs.
"""

import contextlib, ctypes, gc, io, json, math, os, random, re, shlex, shutil, signal, statistics, struct
import subprocess, sys, tempfile, threading, time, types, unittest, unittest.mock, warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, product
from operator import mul

import microgpt
import vulkan_gemm
from microgpt import CharTokenizer, Config, FastTensor, Matrix, Tensor, Value

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "microgpt.py")
README = os.path.join(HERE, "README.md")
NAMES = os.path.join(HERE, "../shared/names.txt")
GOLDEN = os.path.join(HERE, "../shared/golden/default_run.txt")
YARDSTICK = os.path.join(HERE, "../shared/yardstick/reference_cost.py")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ENGINES = Matrix, Tensor, FastTensor
SHIPPED = microgpt.read_documents(os.path.join(HERE, "input.txt"))
needs_posix = unittest.skipUnless(hasattr(os, "fork"), "needs POSIX signals and limits")

def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()

def normal(rng, rows, columns):
    """A matrix of normally distributed numbers."""
    return [[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]

def flat(rows):
    """All numbers of a matrix, or of a dictionary of matrices, in one list."""
    rows = chain(*rows.values()) if isinstance(rows, dict) else rows
    return [a for row in rows for a in row]

def read_file(name):
    """The matrices and the metadata of a .safetensors file."""
    (_, metadata), *tensors = microgpt.read_safetensors(name)
    return dict(tensors), metadata

def losses(out):
    """The losses of the steps, as they are printed."""
    return re.findall(r"\| loss (\S+)\r", out)

class Test(unittest.TestCase):
    """A test in a folder of its own, with 60 names in input.txt. It leaves nothing to its neighbors."""
    timeout = 120  # seconds after which a process is killed, which its test notices

    def setUp(self):
        microgpt.tape.clear()  # of a test that failed
        microgpt.gpu_matmuls.cache_clear()
        for number in STOPS:  # a failing test may leave handlers, the collector, patches
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        self.addCleanup(gc.enable if gc.isenabled() else gc.disable)
        closing = types.SimpleNamespace(register=self.addCleanup)  # a GPU is closed after its test
        unittest.mock.patch.object(microgpt, "atexit", closing).start()
        self.addCleanup(unittest.mock.patch.stopall)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        self.file("input.txt", "\n".join(SHIPPED[:60]))

    def tearDown(self):
        self.assertEqual(len(microgpt.tape), 0)

    def assertClose(self, got, wanted, tolerance=1e-9):
        """The same shape, and every number within a tolerance relative to the largest of them."""
        self.assertEqual(list(map(len, got)), list(map(len, wanted)))
        got, wanted = flat(got), flat(wanted)
        scale = max([1e-3, *map(abs, wanted)])
        for i, (a, b) in enumerate(zip(got, wanted)):
            self.assertLessEqual(abs(a - b), tolerance * scale, f"number {i}: {a} is not {b}")

    def file(self, name, content):
        with open(name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return os.path.abspath(name)

    def content(self, name):
        with open(name, "rb") as file:
            return file.read()

    def trace(self, name="run.jsonl"):
        """The lines of a trace that are of a step: all but the first."""
        return [json.loads(line) for line in self.content(name).splitlines()[1:]]

    def weights(self, name="run"):
        tensors, _ = read_file(name)
        return {name: rows for name, rows in tensors.items() if not name.startswith("optimizer.")}

    def main(self, flags="", *more, out=None, **options):
        """Run the command line in this process. Returns its status, standard output and standard error."""
        out, errors = out or io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unittest shows more of them than a run does
            status = microgpt.main([*flags.split(), *more], **options)
        if status:
            microgpt.tape.clear()  # of what it was at
        return status, out.getvalue(), errors.getvalue()

    def printed(self, flags="", *more):
        """What a run prints that has nothing to complain of."""
        status, out, errors = self.main(flags, *more)
        self.assertEqual((status, errors), (0, ""), (flags, more))
        return out

    def assertRefused(self, status, pattern, flags, *more):
        """The run ends with this status and one line that matches, before its first step."""
        got, out, errors = self.main(flags, *more)
        self.assertEqual((got, errors.count("\n"), "step" in out), (status, 1, False), errors)
        self.assertRegex(errors, r"^microgpt: error: .*(" + pattern + ")")

    def start(self, flags="", *more, script=SCRIPT, handler=signal.SIG_DFL, env=(), **options):
        """Start a script as a process in a session of its own, its output unbuffered."""
        if hasattr(os, "fork"):
            handle = lambda: [signal.signal(number, handler) for number in STOPS]
            options = {"start_new_session": True, "preexec_fn": handle, **options}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1", **dict(env)}
        command = [sys.executable, script, *flags.split(), *more]
        process = subprocess.Popen(command, bufsize=0, env=env, **{**pipes, **options})
        timer = threading.Timer(self.timeout, process.kill)
        timer.start()
        for cleanup in (process.wait, process.kill, timer.join, timer.cancel):
            self.addCleanup(cleanup)
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            self.addCleanup(stream.close)
        return process

    def script(self, flags="", *more, **options):
        """Run a script as a process. Returns its status, standard output and standard error."""
        process = self.start(flags, *more, **options)
        out, errors = [(text or b"").decode().replace(os.linesep, "\n") for text in process.communicate()]
        return process.returncode, out, errors

    def driver(self, code):
        """A script that can import microgpt and vulkan_gemm, and runs this code."""
        start = f"import os, sys\nsys.path.insert(0, {HERE!r})\nimport microgpt, vulkan_gemm\n"
        return self.file("driver.py", start + code)

# 1. Dataset -----------------------------------------------------------------------------------------------

class TestDataset(Test):
    def test_documents_are_the_stripped_lines_without_blank_ones_as_in_input_txt(self):
        path = self.file("a.txt", "\ufeffanna\r\n\r\n  bob b \n\t\n\nzoë\na\x0bb\u2028c\x85d")
        self.assertEqual(microgpt.read_documents(path), ["anna", "bob b", "zoë", "a\x0bb\u2028c\x85d"])
        self.assertGreaterEqual(len(set(SHIPPED)), 5000)
        self.assertEqual(read(os.path.join(HERE, "input.txt")), "".join(f"{name}\n" for name in SHIPPED))
        self.assertTrue(all(re.fullmatch("[a-z]{2,15}", name) for name in SHIPPED))

# 2. Characters --------------------------------------------------------------------------------------------

class TestCharTokenizer(Test):
    def test_ids_are_the_sorted_characters_then_bos_and_any_text_comes_back(self):
        tokenizer = CharTokenizer(["zyxwvutsrqponm", "abcdefghijkl", "emma"])
        self.assertEqual([tokenizer.bos, *tokenizer.encode("emma"), tokenizer.bos], [26, 4, 12, 12, 0, 26])
        self.assertEqual(tokenizer.vocab_size, 27)
        for text in ("", "anna", "e\u0301e\u0301", "👩‍👩‍👧 🇫🇷", "שלום עולם", "a\nb\tc \0", "\U0010ffff"):
            tokenizer = CharTokenizer([text, "x"])
            ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.bos]
            self.assertEqual(tokenizer.decode(ids), text)
            with self.assertRaisesRegex(KeyError, "é"):
                tokenizer.encode(text + "é")

# 3. Autograd on one number --------------------------------------------------------------------------------

FUNCTIONS = {name: lambda a, name=name, plain=plain: getattr(a, name)() if isinstance(a, Value) else plain(a)
             for name, plain in (("exp", math.exp), ("log", math.log), ("relu", lambda a: max(0.0, a)))}

class TestValue(Test):
    def test_every_operator_against_finite_differences(self):
        one_number = "-a; a + 2; 2 + a; a - 2; 2 - a; a * 3; 3 * a; a / 3; 3 / a; a ** 3; a ** -0.5"
        functions = "exp(a); exp(-a); log(a); relu(a); relu(-a); relu(a - b)"
        both = "a + b; a - b; a * b; a / b; a + a; a * a + a / a - a; (a * b + a) * (a - b) / (a * a + 1)"
        rng, h = random.Random(1), 1e-6
        for source in "; ".join([one_number, functions, both]).split("; "):
            f = eval(f"lambda a, b: {source}", FUNCTIONS)
            for _ in range(5):
                x, y = rng.uniform(0.3, 2), rng.uniform(0.3, 2)
                a, b = Value(x), Value(y)
                with self.subTest(source, a=x, b=y):
                    out = f(a, b)
                    self.assertAlmostEqual(out.data, f(x, y), 12)
                    inputs = {*chain(*[node.inputs for node in microgpt.tape])}
                    self.assertLessEqual(inputs, {a, b, *microgpt.tape})  # a plain number makes no node
                    microgpt.backward(out)
                    self.assertAlmostEqual(a.grad, (f(x + h, y) - f(x - h, y)) / (2 * h), 6)
                    self.assertAlmostEqual(b.grad, (f(x, y + h) - f(x, y - h)) / (2 * h), 6)

    def test_the_example_of_section_3(self):
        a, b = Value(2.0), Value(3.0)
        c = a * b + a
        microgpt.backward(c)
        self.assertEqual((c.data, a.grad, b.grad), (8.0, 4.0, 2.0))
        microgpt.backward(a * b)  # gradients add up
        self.assertEqual((a.grad, b.grad), (7.0, 4.0))
        x = a = Value(1.0)
        for _ in range(20_000):  # no graph is too deep
            x = x * 1.00001 + 0.0
        microgpt.backward(x)
        self.assertAlmostEqual(a.grad, 1.00001**20_000, 6)

# 4 and 9. The operations, in Values and a matrix at a time; and those of section 14 ------------------------

def operations(rng):
    """Name -> (operation, its inputs) on random shapes, down to one row and one channel."""
    t, d, e = (rng.choice([1, 2, 3, 6, 9]) for _ in range(3))
    x, z, w, back = normal(rng, t, d), normal(rng, t, d), normal(rng, e, d), normal(rng, 3, e)
    ids = [rng.randrange(e) for _ in range(t)]
    n_head, size = rng.randint(1, 3), rng.randint(1, 4)
    lengths = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    qkv = [normal(rng, sum(lengths), n_head * size) for _ in "qkv"]

    def attention(q, k, v):
        return q.attention(k, v, n_head, [cache for n in lengths for cache in [([], [])] * n])

    return {
        "embed": (lambda table: table.embed(ids), [w]), "add": (lambda x, z: x + z + x.rmsnorm(), [x, z]),
        "linear": (lambda x, w: x.linear(w), [x, w]), "linear by itself": (lambda x: x.linear(x), [x]),
        "rmsnorm": (lambda x: x.rmsnorm(), [[[0.0] * d, *x]]), "cross entropy": (lambda x: x, [x]),
        "relu of a relu": (lambda x, w: (x.linear(w).relu() + x.linear(w)).relu(), [x, w]),
        "mlp": (lambda x, w, back: x.linear(w).relu().linear(back), [x, w, back]),
        "attention": (attention, qkv),
        "center": (lambda x: x.center(), [x]), "product": (lambda x, z: x * z, [x, z]),
        "square": (lambda x: x * x, [x]), "gelu": (lambda x: x.gelu(), [x]),
    }

def gradients(engine, f, inputs):
    """The numbers of f's result, a loss that depends on all of it, and the gradients of the inputs."""
    microgpt.tape.clear()
    inputs = list(map(engine.wrap, inputs))
    out = f(*inputs)
    head = engine.wrap(normal(random.Random(1), 3, len(out.data[0])))
    loss = out.linear(head).cross_entropy([t % 3 for t in range(len(out.data))])
    microgpt.backward(loss)
    return out.data, loss.data, [matrix.grad for matrix in inputs]

def slope(f, row, j, h=1e-6):
    """The derivative of f(), which reads row, by row[j]."""
    before, results = row[j], []
    for row[j] in (before + h, before - h):
        results.append(f())
    row[j] = before
    return (results[0] - results[1]) / (2 * h)

class TestOperations(Test):
    def test_every_operation_against_finite_differences_and_the_engines_against_each_other(self):
        for seed in range(12):
            for name, (f, inputs) in operations(random.Random(seed)).items():
                before, rng = json.dumps(inputs), random.Random(seed)
                out, loss, grads = gradients(Matrix, f, inputs)
                with self.subTest(name, seed=seed):
                    for rows, grad in zip(inputs, grads):
                        i, j = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
                        wanted = slope(lambda: gradients(Matrix, f, inputs)[1], rows[i], j)
                        self.assertAlmostEqual(grad[i][j], wanted, delta=1e-6 * max(1, abs(wanted)))
                    for engine in (Tensor, FastTensor):
                        got, got_loss, got_grads = gradients(engine, f, inputs)
                        for a, b in zip([got, [[got_loss]], *got_grads], [out, [[loss]], *grads]):
                            self.assertClose(a, b)
                    self.assertEqual(json.dumps(inputs), before)

    def test_large_logits_and_scores_and_relu_at_0(self):
        for engine in ENGINES:
            for row, wanted, grad in (([-1e4, 1e4, 0.0], 2e4, [-1.0, 1.0, 0.0]),
                                      ([1e4, 1e4, 1e4], math.log(3), [-2 / 3, 1 / 3, 1 / 3])):
                x = engine.wrap([row])
                loss = x.cross_entropy([0])
                self.assertAlmostEqual(loss.data, wanted, 9)
                microgpt.backward(loss)
                self.assertClose(x.grad, [grad])
            for keys, wanted in (([[1e4], [1e4]], [[1.0], [1.5]]), ([[1e4], [-1e4]], [[1.0], [1.0]])):
                q, k, v = map(engine.wrap, ([[1.0], [1.0]], keys, [[1.0], [2.0]]))
                self.assertClose(q.attention(k, v, 1, [([], [])] * 2).data, wanted)
            out, _, (grad,) = gradients(engine, lambda x: x.relu(), [[[0.0, -0.0, 1.0, -1.0]]])
            self.assertEqual(out, [[0.0, 0.0, 1.0, 0.0]])
            self.assertEqual([a != 0 for a in grad[0]], [False, False, True, False])

# 5. GPT, and section 14, GPT-2 as published ----------------------------------------------------------------

DOCS = [[1, 2, 3, 4], [5, 6], [7, 1, 1, 2, 9, 10]]
MODELS = (microgpt.gpt, microgpt.shapes), (microgpt.gpt2, microgpt.gpt2_shapes)

def model(shapes=microgpt.shapes, n_layer=2, n_embd=8, n_head=2, block_size=8, vocab_size=11):
    """A small model with weights large enough to matter, all of them."""
    config = Config(vocab_size, n_layer, n_embd, n_head, block_size)
    return config, {name: normal(random.Random(name), *shape) for name, shape in shapes(config).items()}

def logits(engine, config, weights, *chunks, gpt=microgpt.gpt):
    """The logits of a document that is handed over in chunks."""
    w = {name: engine.wrap(rows) for name, rows in weights.items()}
    cache, out = microgpt.new_cache(config), []
    for chunk in chunks:
        positions = range(len(out), len(out) + len(chunk))
        out += gpt(config, w, chunk, positions, [cache] * len(chunk)).data
        microgpt.tape.clear()
    return out

def softmax(scores, temperature=1):
    exps = [math.exp((a - max(scores)) / temperature) for a in scores]
    return [e / sum(exps) for e in exps]

def gelu(a):
    return a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))

def by_hand(weights, ids, n_head):
    """The logits of a model, position after position, in loops and sums alone; and where its heads look, as
    maps[layer][head]. A model with gains is a GPT-2."""
    gpt2 = "ln_f" in weights
    past = [([], []) for name in weights if name.endswith("attn_wq")]
    out, maps = [], [[[] for _ in range(n_head)] for _ in past]

    def linear(name, x):
        biases = weights[name + ".bias"][0] if gpt2 else [0.0] * len(weights[name])
        return [sum(map(mul, row, x)) + bias for row, bias in zip(weights[name], biases)]

    def norm(name, x):
        mean = sum(x) / len(x) if gpt2 else 0.0
        scale = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + 1e-5)
        x = [(a - mean) / scale for a in x]
        gains_and_biases = (weights[name] + weights[name + ".bias"]) if gpt2 else ()
        return [a * gain + bias for a, gain, bias in zip(x, *gains_and_biases)] if gpt2 else x

    for t, i in enumerate(ids):
        x = [a + b for a, b in zip(weights["wte"][i], weights["wpe"][t])]
        x = x if gpt2 else norm("", x)
        size = len(x) // n_head
        for layer, (keys, values) in enumerate(past):
            normed = norm(f"layer{layer}.ln1", x)
            q, k, v = (linear(f"layer{layer}.attn_w{letter}", normed) for letter in "qkv")
            keys.append(k)
            values.append(v)
            found = []
            for start in range(0, len(x), size):
                head = slice(start, start + size)
                shares = softmax([sum(map(mul, q[head], key[head])) / math.sqrt(size) for key in keys])
                maps[layer][start // size].append(shares)
                found += [sum(map(mul, shares, column)) for column in zip(*[value[head] for value in values])]
            x = [a + b for a, b in zip(x, linear(f"layer{layer}.attn_wo", found))]
            hidden = linear(f"layer{layer}.mlp_fc1", norm(f"layer{layer}.ln2", x))
            hidden = [gelu(a) if gpt2 else max(0, a) for a in hidden]
            x = [a + b for a, b in zip(x, linear(f"layer{layer}.mlp_fc2", hidden))]
        x = norm("ln_f", x) if gpt2 else x
        out.append([sum(map(mul, row, x)) for row in weights["wte" if gpt2 else "lm_head"]])
    return out, maps

class TestGPT(Test):
    def test_the_loss_of_the_first_weights_is_that_of_the_reference(self):
        config = Config(vocab_size=27, n_layer=2)
        weights = microgpt.initial_weights(config, random.Random(42))
        docs = [[26, 4, 12, 12, 0, 26], [26, 0, 21, 0, 26]]
        loss, _ = microgpt.loss_and_grads(config, weights, docs, Tensor)
        self.assertAlmostEqual(loss, 3.140505474484, 11)

    def test_a_gpt2_begins_as_published(self):
        self.printed("--steps 0 --samples 0 --layers 2 --d-model 64 --arch gpt2 --save run")
        weights = self.weights()
        self.assertNotIn("lm_head", weights)  # that is wte
        names = ["attn_wq", "attn_wk", "attn_wv", "attn_wo", "mlp_fc1", "mlp_fc2", "ln1", "ln2"]
        names = ["wte", "wpe", "ln_f", *[f"layer{i}.{name}" for i in (0, 1) for name in names]]
        biases = [f"{name}.bias" for name in names if name not in ("wte", "wpe")]
        self.assertEqual(set(weights), {*names, *biases})
        for name, rows in weights.items():
            deviation = math.sqrt(sum(a * a for a in flat(rows)) / len(flat(rows)))
            if name in biases or "ln" in name:
                self.assertEqual(set(flat(rows)), {0.0 if name in biases else 1.0}, name)
            else:
                residual = name.endswith(("attn_wo", "mlp_fc2"))
                self.assertAlmostEqual(deviation, 0.01 if residual else 0.02, delta=0.001, msg=name)

    def test_logits_are_those_of_a_computation_by_hand_in_one_pass_or_several(self):
        tokens = [1, 2, 3, 3, 10, 0, 7, 2]
        for (gpt, shapes), engine in product(MODELS, ENGINES):
            config, weights = model(shapes)
            whole = logits(engine, config, weights, tokens, gpt=gpt)
            self.assertClose(whole, by_hand(weights, tokens, 2)[0])
            for chunks in [[token] for token in tokens], (tokens[:3], tokens[3:4], tokens[4:]):
                got = logits(engine, config, weights, *chunks, gpt=gpt)
                if engine is FastTensor:  # where it leaves out zeros depends on the rows that it gets
                    self.assertClose(got, whole, 1e-12)
                else:
                    self.assertEqual(got, whole)

    def test_gradients_of_the_whole_model_against_finite_differences_and_each_other(self):
        for gpt, shapes in MODELS:
            (config, weights), rng = model(shapes), random.Random(2)
            compute = lambda engine: microgpt.loss_and_grads(config, weights, DOCS, engine, gpt)
            loss, wanted = compute(Matrix)
            for engine in (Tensor, FastTensor):
                got, grads = compute(engine)
                self.assertAlmostEqual(got, loss, 12)
                self.assertEqual(list(grads), list(weights))
                for name in weights:
                    self.assertClose(grads[name], wanted[name])
            for name, rows in weights.items():
                i, j = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
                number = slope(lambda: compute(FastTensor)[0], rows[i], j)
                self.assertAlmostEqual(wanted[name][i][j], number, 6, name)

# 6. Adam, and section 15, the other optimizers ------------------------------------------------------------

class TestOptimizers(Test):
    def test_steps_of_each_against_its_formula(self):
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
        optimizers = [*microgpt.OPTIMIZERS.items(), ("adam", microgpt.adam)]
        for (name, optimizer), b1, eps in product(optimizers, (0.85, 0.9), (1e-8, 0.1)):
            b2, decay, rng, (move_m, move_v, move_w) = 0.99, 0.01, random.Random(4), formulas[name]
            settings = {} if b1 == 0.85 else {"beta1": b1}  # or the defaults
            weights = {"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)}
            m, v = microgpt.zeros(weights), microgpt.zeros(weights)
            wanted = [(w, 0.0, 0.0) for w in flat(weights)]
            for t in range(1, 6):
                lr, grads = 0.1 / t, {"a": normal(rng, 2, 3), "b": [[0.0, 1e-7]]}
                optimizer(weights, grads, m, v, t - 1, lr, eps=eps, **settings)
                for i, (g, (w, mi, vi)) in enumerate(zip(flat(grads), wanted)):
                    mi, vi = move_m(mi, g), move_v(vi, g)
                    wanted[i] = move_w(w, g, mi, vi, t), mi, vi
                with self.subTest(name, b1=b1, eps=eps, t=t):
                    for got, numbers in zip((weights, m, v), zip(*wanted)):
                        self.assertClose([flat(got)], [numbers], 1e-12)

    def test_clipping_goes_by_the_norm_of_all_gradients_together(self):
        for grads, wanted in (
            ({"a": [[1.0, -1.0]], "b": [[0.5]]}, [1.0, -1.0, 0.5]),  # small enough
            ({"a": [[2.0, 0.0], [0.0, -3.0]], "b": [[6.0]]}, [4 / 7, 0.0, 0.0, -6 / 7, 12 / 7]),  # norm 7
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

# 7 and 8. Training and sampling ---------------------------------------------------------------------------

class TestTraining(Test):
    def test_part_one_runs_by_itself_and_does_what_the_command_line_does(self):
        part_one, _ = read(SCRIPT).split("# PART TWO")
        self.file("long.txt", "ab" * 12 + "\nb\ncab\n")  # longer than the context, and fewer than the steps
        calls = "train_and_sample(steps=5)\ntrain_and_sample('long.txt', 7)\n"
        wanted = self.printed("--steps 5") + self.printed("--steps 7 --corpus long.txt")
        self.assertEqual(self.script(script=self.file("part_one.py", part_one + calls)), (0, wanted, ""))

    def test_a_sample_ends_at_bos_or_after_block_size_tokens_and_leaves_nothing_on_the_tape(self):
        (config, weights), rng = model(vocab_size=3), random.Random(7)
        for _ in range(30):
            ids = microgpt.sample(config, weights, 2, 1e9, rng)  # all tokens are equally likely
            self.assertEqual((set(ids) - {0, 1}, len(ids) <= 8, microgpt.tape), (set(), True, []))

# 10. Faster products --------------------------------------------------------------------------------------

class TestFastTensor(Test):
    def test_products_of_all_lengths_and_of_mostly_zeros(self):
        rng, lengths = random.Random(8), (1, 2, 15, 16, 17, 63, 64, 65, 66, 128, 256, 257, 300)

        def matrix(length, density):
            rows = normal(rng, rng.choice([1, 2, 5, 9]), length) + [[0.0] * length] * (density < 1)
            return [[a * (rng.random() < density) for a in row] for row in rows]

        for length, *densities in product(lengths, (1, 0.5, 0.2, 0), (1, 0.5, 0.2, 0)):
            rows, columns = (matrix(length, density) for density in densities)
            wanted = [[math.fsum(map(mul, row, column)) for column in columns] for row in rows]
            with self.subTest(length=length, densities=densities):
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
        docs = [doc.replace("".join(best), chr(new + len(merges))) for doc in docs]
        merges.append(tuple(map(ord, best)))
    return merges, docs

def characters(docs):
    """Documents as strings of chr(id), and the number of ids."""
    tokenizer = CharTokenizer(docs)
    return ["".join(map(chr, tokenizer.encode(doc))) for doc in docs], len(tokenizer.tokens)

class TestBPE(Test):
    def test_merges_and_encoding_are_those_of_a_recount(self):
        cases = [(9, ["banana"]), (9, ["a" * 31]), (9, ["aaaabaaab", "aaa", "aabaa"]), (90, SHIPPED[:300]),
                 (80, [read(SCRIPT)[:5000]]), (20, ["abab" * 9, "ba"]), (5, ["", "a", ""]), (0, ["abab"]),
                 (9, ["é😀é😀", "😀é😀é"])]
        for seed in range(190):
            rng = random.Random(seed)
            letters, docs = "abcde"[: rng.randint(1, 5)], range(rng.randint(1, 4))
            docs = ["".join(rng.choices(letters, k=rng.randint(0, 50))) for _ in docs]
            cases.append((rng.randint(0, 25), [*docs, "x"]))
        for n, docs in cases:
            with self.subTest(n=n, docs=docs[:3]):
                strings, new = characters(docs)
                merges, encoded = recount(strings, n, new)
                self.assertEqual(microgpt.learn_merges(strings, n, new), merges)
                tokenizer = microgpt.BPETokenizer(docs, merges)
                ids = list(map(tokenizer.encode, docs))
                self.assertEqual([list(map(ord, doc)) for doc in encoded], ids)
                self.assertEqual([tokenizer.decode([tokenizer.bos, *each]) for each in ids], docs)
                self.assertEqual((tokenizer.bos, tokenizer.vocab_size - 1), (new + len(merges),) * 2)

# 12. The GPU ----------------------------------------------------------------------------------------------

def count_devices():
    """The number of Vulkan devices here, by bare ctypes: no bug of vulkan_gemm can skip its own tests."""
    names = {"win32": "vulkan-1", "darwin": "libvulkan.dylib"}
    try:
        loader = ctypes.CDLL(names.get(sys.platform, "libvulkan.so.1"))
    except OSError:
        return 0
    info, instance, count = (ctypes.c_uint64 * 8)(1), ctypes.c_void_p(), ctypes.c_uint32()
    if loader.vkCreateInstance(info, None, ctypes.byref(instance)):
        return 0
    loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    loader.vkDestroyInstance(instance, None)
    return count.value

class FakeGPU:
    """A device in a world of its own, where things take the seconds that they are said to take."""
    def __init__(self, plain, trip, term, wrong=None):
        self.costs, self.wrong, self.now, self.shader_seconds = (plain, trip, 3e-8, term), wrong, 0.0, 0.0
        self.physical = types.SimpleNamespace(name="fake")

    clock = perf_counter = process_time = lambda self: self.now
    matmuls = lambda self, *matrices: self.call("gpu", *matrices)
    plain = lambda self, *matrices: self.call("plain", *matrices)

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
        if self.wrong is not None and went == "gpu":
            return [[[self.wrong] * len(b) for _ in a] for a, b in zip(many_rows, many_columns)]
        return list(map(Tensor.matmul, many_rows, many_columns)) if len(many_rows[0]) < 100 else None

class TestWithoutGPU(Test):
    @unittest.skipUnless(shutil.which("spirv-val"), "needs spirv-val")
    def test_spirv_val_accepts_the_shipped_shader(self):
        subprocess.check_call(["spirv-val", self.file("gemm.spv", vulkan_gemm.load_shader())])

    @unittest.skipUnless(shutil.which("spirv-opt"), "needs spirv-opt")
    def test_the_shader_unrolls_to_one_loop_and_registers_alone(self):
        shipped = self.file("gemm.spv", vulkan_gemm.load_shader())
        subprocess.check_call(["spirv-opt", "-O", "--loop-unroll", shipped, "-o", "unrolled.spv"])
        words, i, loops, indexed = memoryview(self.content("unrolled.spv")).cast("I"), 5, 0, 0
        while i < len(words):  # an instruction is its length and number, then its operands
            length, number = divmod(words[i], 1 << 16)
            loops += number == 246  # OpLoopMerge
            indexed += number == 59 and words[i + 3] == 7  # OpVariable in a function: no register will do
            i += length
        self.assertEqual((loops, indexed), (1, 0))

    def test_the_shipped_shader_is_that_of_gemm_comp_and_an_edited_one_is_refused(self):
        self.assertEqual(vulkan_gemm.source_hash(), vulkan_gemm.SHADER_SHA256)
        with unittest.mock.patch("vulkan_gemm.source_hash", lambda: "edited"):
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "edited.*--compile.*glslc"):
                vulkan_gemm.load_shader()

    @unittest.skipUnless(shutil.which("glslc"), "needs glslc")
    def test_compiling_changes_the_hash_and_the_shader_alone(self):
        shutil.copy(os.path.join(HERE, "vulkan_gemm.py"), "edited.py")
        self.file("gemm.comp", read(os.path.join(HERE, "gemm.comp")).replace("8 x 8", "eight by eight"))
        self.assertEqual(self.script("--compile", script="edited.py"), (0, "", ""))
        shader = r'(?s)SHADER_SHA256 = "\w+"\nSHADER_SPIRV = """.*?"""\n'
        self.assertEqual(*[re.split(shader, read(path)) for path in (vulkan_gemm.__file__, "edited.py")])
        self.assertEqual(self.script("-c", "import edited; edited.load_shader()", script="-B"), (0, "", ""))

    def test_without_a_loader_a_driver_a_device_or_the_second_file_one_line_says_so(self):
        with unittest.mock.patch("ctypes.CDLL", side_effect=OSError), \
                unittest.mock.patch("shutil.which", "dnf".__eq__):
            self.assertRefused(1, r"no Vulkan loader .*\(dnf install vulkan-loader", "--vulkan --steps 1")
        with unittest.mock.patch("shutil.which", "apk".__eq__):
            checked, hint = vulkan_gemm.Vulkan._checked, r" on this system \(apk add vulkan-loader"
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "^no Vulkan driver" + hint):
                checked("vkCreateInstance", lambda: -9)()  # VK_ERROR_INCOMPATIBLE_DRIVER
            for none in (lambda: vulkan_gemm.choose_device([]),
                         checked("vkEnumeratePhysicalDevices", lambda: -3)):  # INITIALIZATION_FAILED
                with self.assertRaisesRegex(vulkan_gemm.VulkanError, "^no Vulkan device" + hint):
                    none()
        alone = self.script("--vulkan", script=shutil.copy(SCRIPT, "alone.py"), env={"PYTHONPATH": ""})[::2]
        line = "microgpt: error: --vulkan needs vulkan_gemm.py beside microgpt.py; nothing was saved\n"
        self.assertEqual(alone, (1, line))

    def test_products_go_where_they_are_faster_and_are_right(self):
        shapes = [(1, 8, 8, 8), (1, 16, 16, 16), (1, 32, 32, 32), (1, 128, 128, 128), (1, 1024, 256, 64)]
        shapes += [(1, 64, 64, 1024), (32, 128, 128, 16), (32, 128, 16, 128)]  # 32: attention
        went = set()
        for costs in ((4e-8, 4e-4, 9e-9), (3e-8, 1e-4, 1e-12), (3e-8, 4e-4, 1e-7), (1e-8, 1e-2, 1e-9)):
            fake = FakeGPU(*costs)
            with unittest.mock.patch("vulkan_gemm.time", fake):
                matmuls = vulkan_gemm.offload(fake, fake.plain)
            for many, m, n, k in shapes:
                rows, columns = [[[1.0] * k] * m] * many, [[[1.0] * k] * n] * many
                plain, travel, device = fake.seconds(rows, columns)
                matmuls(rows, columns)
                if not 1 / 2 < plain / (travel + device) < 3:  # it computes whole blocks, a trip counts twice
                    wanted = "gpu" if travel + device < plain else "plain"
                    self.assertEqual(fake.went, wanted, (costs, many, m, n, k))
                    went.add((wanted, many))
            matmuls([[[0.0] * 128] * 128], [[[1.0] * 128] * 128])
            self.assertEqual(fake.went, "plain")  # which leaves zeros out
        self.assertEqual(went, {("gpu", 1), ("gpu", 32), ("plain", 1), ("plain", 32)})
        for wrong in (math.nan, 0.5):
            fake = FakeGPU(3e-8, 4e-4, 5e-9, wrong)
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "fake computes wrong products"):
                vulkan_gemm.offload(fake, fake.plain)

    def test_kinds_of_devices_and_of_memory_in_the_order_of_preference(self):
        kinds = ["discrete", "virtual", "integrated", "cpu", "other"]
        self.assertEqual(list(vulkan_gemm.DEVICE_TYPES.items()), list(zip((2, 3, 1, 4, 0), kinds)))
        memory = vulkan_gemm.VkPhysicalDeviceMemoryProperties(memoryTypeCount=7)
        memory.memoryHeaps[0].size = 1000
        for kind, flags in zip(memory.memoryTypes, (1, 14, 6, 7, 1 << 6 | 15, 15, 15)):
            kind.propertyFlags = flags
        memory.memoryTypes[3].heapIndex = 1  # which is empty
        limits = types.SimpleNamespace(maxTexelBufferElements=9, maxStorageBufferRange=11)
        physical = types.SimpleNamespace(memory=memory, limits=limits, name="fake")
        needs = vulkan_gemm.VkMemoryRequirements(size=9, memoryTypeBits=63)
        for is_input, limit, order in ((True, 144, [5, 1, 2, 5]), (False, 8, [1, 5, 1, 2, 5])):
            buffer = vulkan_gemm.Buffer(None, None, physical, is_input)
            self.assertEqual((buffer.limit, buffer._memory_types(needs)), (limit, order))
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "more than fake allows"):
                buffer.reserve(limit + 1)

LAYER = "VK_LAYER_KHRONOS_validation"
MANIFESTS = [f"{folder}/vulkan/explicit_layer.d/{name}.json" for name in (LAYER, "VkLayer_khronos_validation")
             for folder in ("/usr/share", "/usr/local/share", "/etc")]
CHECKS = """
khronos_validation.debug_action = VK_DBG_LAYER_ACTION_LOG_MSG
khronos_validation.log_filename = stdout
khronos_validation.report_flags = error,warn,perf
khronos_validation.enables = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT,\
VK_VALIDATION_FEATURE_ENABLE_BEST_PRACTICES_EXT,VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_EXT,\
VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_RESERVE_BINDING_SLOT_EXT
"""
MANY_PRODUCTS = """
import ctypes, random, types
mistake = sys.argv[1]
if mistake == "bounds":
    fields = vulkan_gemm.CONSTANTS
    pack = lambda m, n, k, a, b, c, *others: fields.pack(m, n, k, a, b, c + 2**24, *others)
    vulkan_gemm.CONSTANTS = types.SimpleNamespace(size=fields.size, pack=pack)
if mistake == "race":
    vulkan_gemm.STORAGE_USAGE |= 2  # so that it may be filled
with vulkan_gemm.VulkanGemm() as gpu:
    if mistake == "race":
        fill, end = vulkan_gemm.open_library().vkCmdFillBuffer, gpu.vk.vkEndCommandBuffer
        fill.argtypes = ctypes.c_void_p, *[ctypes.c_uint64] * 3, ctypes.c_uint32
        twice = lambda c: [fill(c, gpu.buffers[2].handle, 0, 64, 0) for _ in "ab"]
        gpu.vk.vkEndCommandBuffer = lambda c: twice(c) and end(c)
    for vulkan_gemm.MAX_K in (vulkan_gemm.MAX_K, 8):
        for n in (1, 5, 64, 300, 17):
            a = [[random.random() for _ in range(n)] for _ in range(n)]
            gpu.matmuls([a, a, a[:1]], [a, a, a])
"""

@unittest.skipUnless(count_devices(), "needs a Vulkan loader and device")
class TestVulkan(Test):
    @unittest.skipUnless(any(map(os.path.exists, MANIFESTS)), "needs the Khronos validation layer")
    def test_the_validation_layer_speaks_of_mistakes_alone(self):
        self.file("vk_layer_settings.txt", CHECKS)
        cases = ("none", "^$"), ("race", "SYNC-HAZARD-WRITE-AFTER-WRITE"), ("bounds", "out of bounds")
        for mistake, pattern in cases:  # where the layer is not loaded, nobody sees the mistakes
            script, layer = self.driver(MANY_PRODUCTS), {"VK_INSTANCE_LAYERS": LAYER}
            status, out, errors = self.script(mistake, script=script, env=layer)
            self.assertEqual((status, errors), (0, ""))
            self.assertRegex(out, pattern)

    def six(self, gpu):
        self.assertEqual(gpu.matmul([[2.0]], [[3.0]]), [[6.0]])

    def replace(self, gpu, name, replacement):
        """Let a function of Vulkan be replacement(function, *arguments) from now on."""
        function = getattr(gpu.vk, name)
        setattr(gpu.vk, name, lambda *arguments: replacement(function, *arguments))

    def recorded(self, gpu, *names):
        """A list to which these functions of Vulkan add their names when they are called."""
        calls = []
        for name in names:
            self.replace(gpu, name, lambda function, *args, name=name: calls.append(name) or function(*args))
        return calls

    def fail_once(self, gpu, name, error, after=False):
        """Let the next call of a function of Vulkan raise an error, in its place or after it."""
        function = getattr(gpu.vk, name)

        def failing(*arguments):
            setattr(gpu.vk, name, function)
            if after:
                function(*arguments)
            raise error

        setattr(gpu.vk, name, failing)

    def test_random_shapes_and_batches_against_plain_python_at_once_or_in_parts(self):
        rng = random.Random(1)
        for limits in ({}, {"MAX_TERMS": 5000, "MAX_K": 8}, {"MAX_GROUPS": 1}, {"limit": 1 << 12}):
            bytes_at_once, groups = limits.pop("limit", 1 << 20), []
            with unittest.mock.patch.multiple("vulkan_gemm", **{"MAX_K": 1 << 13, **limits}), \
                    vulkan_gemm.VulkanGemm() as gpu:
                note = lambda function, *args: groups.extend(args[1:]) or function(*args)
                self.replace(gpu, "vkCmdDispatch", note)
                for buffer in gpu.buffers:
                    buffer.limit = bytes_at_once
                for top in (9, 70, 9, 100):
                    shapes = [[rng.randint(1, top) for _ in "mnk"] for _ in range(3)]
                    a, b = ([normal(rng, shape[i], shape[2]) for shape in shapes] for i in (0, 1))
                    for buffer in gpu.buffers:  # what was there before must not matter
                        if buffer.capacity:
                            ctypes.memset(buffer.mapped, 0xFF, buffer.capacity)
                    for rows, columns, c in zip(a, b, gpu.matmuls(a, b)):
                        self.assertClose(c, FastTensor.matmul(rows, columns), 1e-5)
                    self.assertEqual(gpu.matmul(a[0], list(zip(*b[0]))), gpu.matmuls(a, b)[0])
                self.assertLessEqual(max(groups), limits.get("MAX_GROUPS", 2))

    def test_long_products_go_in_parts_each_after_the_one_before(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            for k in (8191, 8192, 8193, 260_000):  # for which the buffers grow
                a, b = [i % 7 for i in range(k)], [i % 3 for i in range(k)]
                calls = self.recorded(gpu, "vkCmdDispatch", "vkCmdPipelineBarrier")
                self.assertEqual(gpu.matmul([a], [[x] for x in b]), [[sum(map(mul, a, b))]])
                self.assertEqual(calls, ["vkCmdDispatch", "vkCmdPipelineBarrier"] * -(-k // 8192))
        with vulkan_gemm.VulkanGemm() as gpu, unittest.mock.patch("vulkan_gemm.MAX_TERMS", 1 << 16):
            calls, ones = self.recorded(gpu, "vkCmdDispatch", "vkQueueSubmit"), [[1.0] * 64] * 64
            self.assertEqual(gpu.matmuls([ones, ones[:1]], [ones, ones[:1]]), [[[64.0] * 64] * 64, [[64.0]]])
            self.assertEqual((calls, gpu.matmuls([], [])), (["vkCmdDispatch", "vkQueueSubmit"] * 5, []))
            gpu.buffers[0].limit = 16
            gpu.buffers[0].free()
            with self.assertRaisesRegex(vulkan_gemm.VulkanError, "more than .* allows"):
                gpu.matmul([[1.0] * 5], [[1.0]] * 5)

    def test_nan_and_infinity_stay_where_they_belong_and_misfits_are_refused(self):
        with vulkan_gemm.VulkanGemm() as gpu:
            (a, b), (c, d), (e, f) = gpu.matmul([[1, math.inf], [math.nan, 0], [1, 1]], [[1, 2], [3, 0]])
            self.assertEqual((a, e, f), (math.inf, 4.0, 2.0))
            self.assertTrue(all(map(math.isnan, (b, c, d))))
            one = [[1.0]]
            for x, y in (([], []), ([[]], [[]]), (one, [[1.0], [2.0]]), ([[1.0], [1.0, 2.0]], one)):
                with self.assertRaises(ValueError):
                    gpu.matmul(x, y)
            with self.assertRaises(ValueError):
                gpu.matmuls([one, one], [one])
            for wrong in (None, "a", 10**400, [1.0]):
                for rows in ([[1.0, wrong]], [[1.0, 2.0], [1.0, wrong]]):
                    with self.assertRaisesRegex(vulkan_gemm.VulkanError, "^not a matrix of numbers: [^\n]*$"):
                        gpu.matmul(rows, [[1.0], [1.0]])
            self.six(gpu)

    def test_threads_take_turns(self):
        def work(number):
            rows, wanted = [[float(number)] * 40] * 40, [[40.0 * number * number] * 40] * 40
            return all(gpu.matmul(rows, rows) == wanted for _ in range(40))

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        with vulkan_gemm.VulkanGemm() as gpu, ThreadPoolExecutor(6) as pool:
            self.assertTrue(all(pool.map(work, range(6))))

    def test_after_an_interrupt_at_any_call_it_goes_on_or_closes_in_order(self):
        names = "BeginCommandBuffer CmdDispatch EndCommandBuffer QueueSubmit WaitForFences ResetFences"
        for name, after, goes_on in product(names.split(), (False, True), (False, True)):
            with self.subTest(name, after=after, goes_on=goes_on), vulkan_gemm.VulkanGemm(timeout=2) as gpu:
                calls = self.recorded(gpu, "vkQueueWaitIdle", "vkFreeMemory")
                self.six(gpu)
                self.assertEqual(calls, [])  # the fence is enough
                self.fail_once(gpu, "vk" + name, KeyboardInterrupt, after)
                with self.assertRaises(KeyboardInterrupt):
                    gpu.matmul([[5.0]], [[5.0]])
                begins = self.recorded(gpu, "vkResetCommandPool", "vkBeginCommandBuffer")
                if goes_on:
                    self.six(gpu)
                    self.assertEqual(begins, ["vkResetCommandPool", "vkBeginCommandBuffer"])
                    continue
                gpu.close()
                if (name, after) in (("QueueSubmit", True), ("WaitForFences", False)):
                    self.assertEqual(calls, ["vkQueueWaitIdle", *["vkFreeMemory"] * 3])

    def test_it_waits_in_short_slices_and_not_forever(self):
        for late in (3, 1000):
            with vulkan_gemm.VulkanGemm(timeout=2) as gpu:
                freed, slices = self.recorded(gpu, "vkFreeMemory"), []

                def wait(function, *arguments):
                    slices.append(arguments[-1])
                    self.assertLess(len(slices), 100)
                    return 2 if len(slices) < late else function(*arguments)  # 2: VK_TIMEOUT

                self.replace(gpu, "vkWaitForFences", wait)
                if late == 3:
                    self.six(gpu)
                    continue
                for error in ("not finished after 2 seconds", "closed"):
                    with self.assertRaisesRegex(vulkan_gemm.VulkanError, error):
                        self.six(gpu)
                gpu.close()
                self.assertEqual((freed, max(slices) <= 10**8), ([], True))  # the memory may be in use

    def test_a_call_that_fails_is_one_error_that_names_it_but_another_kind_of_memory_will_do(self):
        real, patch = vulkan_gemm.Vulkan._checked, unittest.mock.patch.object
        for name in re.findall(r"(\w+)=", vulkan_gemm.FUNCTIONS):
            failing = lambda each, function: real(each, (lambda *args: -4) if each == name else function)
            with patch(vulkan_gemm.Vulkan, "_checked", staticmethod(failing)), \
                    self.assertRaisesRegex(vulkan_gemm.VulkanError, f"^{name}: VK_ERROR_DEVICE_LOST$"), \
                    vulkan_gemm.VulkanGemm() as gpu:
                gpu.pending = name == "vkQueueWaitIdle"  # which only follows an interrupt
                self.six(gpu)
        for name in ("vkAllocateMemory", "vkMapMemory"):
            with vulkan_gemm.VulkanGemm() as gpu:
                self.fail_once(gpu, name, vulkan_gemm.VulkanError("full"))
                self.six(gpu)

    def test_the_losses_are_those_of_the_tensor_engine_by_whichever_way_products_go(self):
        flags = "--steps 3 --layers 2 --d-model 32 --batch-size 4 --stream --lr 0.001 --samples 0"
        sent, numbers = Counter(), lambda out: [list(map(float, losses(out)))]
        send = lambda gpu, rows, columns: sent.update([len(rows)]) or gpu.matmuls(rows, columns)
        wanted = numbers(self.printed(flags))
        for more in ("--vulkan", "--vulkan --workers 2"):
            status, out, errors = self.script(f"{flags} {more}")
            self.assertEqual((status, errors), (0, ""))
            self.assertClose(numbers(out), wanted, 1e-3)
        with unittest.mock.patch("vulkan_gemm.offload", lambda gpu, plain: lambda *args: send(gpu, *args)):
            self.assertClose(numbers(self.printed(f"{flags} --vulkan")), wanted, 1e-3)
        products = 2 * 6 + 1  # linear layers, each with two more on the way back
        self.assertEqual(sent, {1: 3 * 3 * products, 16: 3 * 2 * 6})  # all 4 heads of 4 documents at once

    def test_devices_are_listed_and_one_that_there_is_not_is_refused(self):
        none = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), "nowhere.json")
        status, out, errors = self.script(script=vulkan_gemm.__file__, env=none)
        self.assertEqual((status, out, errors.count("\n")), (1, "", 1))
        self.assertRegex(errors, r"^vulkan_gemm: no Vulkan driver on this system \(.+\)\n$")
        status, out, errors = self.script(script=vulkan_gemm.__file__)
        self.assertEqual((status, out.count("device "), errors), (0, count_devices(), ""))
        self.assertIn(" computes right products\n", out)
        for index in (str(count_devices()), "99", "x"):
            with unittest.mock.patch.dict(os.environ, MICROGPT_VULKAN_DEVICE=index):
                self.assertRefused(1, "MICROGPT_VULKAN_DEVICE", "--vulkan --steps 1")

# 13. All the cores ----------------------------------------------------------------------------------------

def gone(pid):
    """Whether a process is not there, or dead and only waiting to be forgotten."""
    try:
        return read(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True

HANGING = """
import multiprocessing, random, signal
if __name__ == "__main__":
    config, workers = microgpt.Config(9, 4, int(sys.argv[1])), microgpt.Workers(2, microgpt.FastTensor)
    work = config, microgpt.initial_weights(config, random.Random(1)), [[0, 1], [1, 2]]
    workers.loss_and_grads(*work)
    processes = multiprocessing.active_children()
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        workers.loss_and_grads(*work, 0.2)
    except microgpt.UserError as error:
        print(error)
    workers.stop()
    for process in processes:
        process.join()
    print(len(processes), "workers have ended", flush=True)
    os._exit(0)
"""

@needs_posix
class TestWorkers(Test):
    def losses(self, flags):
        """The losses, with all their digits, of a run that must end well."""
        self.printed(f"--samples 0 --trace run.jsonl {flags}")
        return [[line["loss"] for line in self.trace()]]

    def test_1_2_and_4_workers_come_to_the_same_losses_and_as_many_to_the_same_bytes(self):
        for more in ("5", "4 --stream --context 8 --arch gpt2", "4 --engine scalar"):
            flags = f"--steps 5 --d-model 8 --batch-size {more} --save"
            one = self.losses(f"{flags} one")
            for n in (2, 4):
                for name in "ab":
                    self.assertClose(self.losses(f"{flags} {name} --workers {n}"), one)
                self.assertEqual(self.content("a"), self.content("b"))

    def test_a_file_with_the_characters_of_a_glob_is_that_file(self):
        self.file("a[1].txt", "ab\nba\n")
        self.file("a1.txt", "c\n")
        self.assertIn("num docs: 2\n", self.printed("--corpus a[1].txt --steps 0 --samples 0"))

    def test_memory_that_is_full_is_one_line_and_the_work_is_saved(self):
        with unittest.mock.patch.object(microgpt, "norm", side_effect=[1.0, 1.0, MemoryError]):
            status, _, error = self.main("--trace run.jsonl --save run")
        self.assertEqual(status, 1)
        self.assertEqual(error, "microgpt: error: there is not enough memory; step 2 is saved in run\n")
        self.assertEqual(read_file("run")[1]["step"], "2")

    def test_workers_that_hang_are_not_waited_for_forever(self):
        out = "a worker cannot go on: it does not answer\n2 workers have ended\n"
        for width in ("4", "64"):  # whose weights fit into a pipe, or do not
            self.assertEqual(self.script(width, script=self.driver(HANGING)), (0, out, ""))

class Long(Test):
    """Tests of runs that end only when something ends them."""
    def start_run(self, flags="", until="step +9 ", **options):
        process = self.start(f"--steps 1000000 {flags}", **options)
        self.read_until(process, until)
        return process

    def read_until(self, process, pattern):
        """Read the output of a process until it matches."""
        text = b""
        while not re.search(pattern.encode(), text):
            more = process.stdout.read(65536)
            self.assertTrue(more, f"it ended before {pattern!r}")
            text += more

    def assertEnds(self, process, status, pattern):
        """It ends with this status and one line that matches, which this returns."""
        errors = process.communicate()[1].decode()
        self.assertEqual(process.returncode, status, errors)
        self.assertRegex(errors, f"^microgpt: {pattern}\n$")
        return errors

    def assertGoesOn(self):
        """A step is saved, and a run can go on from there. Returns the step."""
        step = int(read_file("run")[1]["step"])
        out = self.printed(f"--resume run --steps {step + 1} --workers 1 --samples 0")
        self.assertEqual(re.findall(r"step +(\d+) / +\d+ \| loss \S+\r", out), [str(step + 1)])
        return step

    def assertSaved(self, process, status, pattern):
        """It ends with one line that matches, and a run goes on from the step that the line says is saved."""
        line = self.assertEnds(process, status, pattern + r" step \d+ is saved in run")
        self.assertIn(f" step {self.assertGoesOn()} ", line)
        os.remove("run")

@unittest.skipUnless(os.path.exists("/proc/thread-self/children"), "needs processes in /proc")
class TestWorkersAsProcesses(Long):
    def start_workers(self, flags="", until="step +9 "):
        """A long run with two workers, and these."""
        process = self.start_run(f"--batch-size 4 --workers 2 --save run {flags}", until)
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        while len(workers := read(children).split()) < 2:  # where a run is only about to start them
            self.assertIsNone(process.poll())
        workers = list(map(int, workers))
        self.addCleanup(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers if not gone(pid)])
        return process, workers

    def assertGone(self, processes):
        end = time.monotonic() + self.timeout
        while not all(map(gone, processes)):
            self.assertLess(time.monotonic(), end, "a worker is left over")
            time.sleep(0.01)

    def test_a_worker_that_is_killed_is_one_line_and_the_work_is_saved(self):
        for flags in "", "--val-fraction 0.5 --eval-every 1 --div-warn 1e9":  # mostly outside of the workers
            process, workers = self.start_workers(flags)
            os.kill(workers[1], signal.SIGKILL)
            self.assertSaved(process, 1, "error: a worker cannot go on: [^\n]*;")
            self.assertGone(workers)

    def test_signals_to_the_whole_group_leave_workers_alone(self):
        for number in STOPS:
            process, workers = self.start_workers()
            os.killpg(process.pid, number)
            self.assertSaved(process, 128 + number, "interrupted;")
            self.assertGone(workers)

    def test_a_signal_to_the_group_while_workers_start_is_one_line(self):
        rng = random.Random(6)
        for number in STOPS * 2:
            process = self.start_run("--batch-size 4 --workers 2", "params")
            time.sleep(rng.uniform(0, 0.05))  # any moment will do
            os.killpg(process.pid, number)
            self.assertEnds(process, 128 + number, "interrupted(; nothing was saved)?")

    def test_a_killed_parent_takes_its_workers_along(self):
        for flags, until in (
            ("", "step +9 "),
            ("--batch-size 20000", "params"),  # all are busy, for half a minute
            ("--gen-every 1 --max-tokens 1000000 --temperature 9", "step +1 "),  # all rest: a sample grows
        ):
            process, workers = self.start_workers(flags, until)
            process.kill()
            process.wait()
            self.assertGone(workers)

    def test_nothing_is_left_over_at_the_end(self):
        process, workers = self.start_workers("--steps 30 --samples 1")
        out, errors = process.communicate()
        self.assertEqual((process.returncode, errors, b"sample  1" in out), (0, b"", True))
        self.assertGone(workers)

# 16. Checkpoints ------------------------------------------------------------------------------------------

def unpack(content):
    """The header of a .safetensors file, and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]

def pack(header, data):
    """A .safetensors file of a header, as JSON or as it is, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data

class TestCheckpoints(Test):
    def saved(self, flags=""):
        """The bytes of a checkpoint after three steps."""
        self.printed(f"--steps 3 --samples 0 --save run {flags}")
        return self.content("run")

    def test_a_resumed_run_is_exactly_the_run_that_was_not_interrupted(self):
        always = "--steps 24 --d-model 8 --context 8 --samples 3 --div-warn 1e9"
        smooth = "--cosine --warmup-steps 7 --batch-size 2 --clip-grad 1"
        def interrupt(text):
            if text.startswith("step   11 "):
                signals.catch(signal.SIGINT, None)
            return io.StringIO.write(out, text)

        for flags in (
            *(f"--optimizer {name} {smooth}" for name in microgpt.OPTIMIZERS),
            "--stream --val-fraction 0.2 --eval-every 8 --gen-every 8",
            "--arch gpt2 --val-fraction 0.1 --eval-every 7 --gen-every 9 --vocab-size 20",
            "--stream --vocab-size 30 --batch-size 2 --weight-decay 0.1 --optimizer adamw --seed 5",
        ):
            with self.subTest(flags):
                whole = self.printed(f"{flags} {always} --save whole")
                out, signals = io.StringIO(), microgpt.Signals()
                out.write = interrupt
                status, part, errors = self.main(f"{flags} {always} --save part", out=out, signals=signals)
                self.assertEqual((status, errors), (130, "microgpt: interrupted; step 11 is saved in part\n"))
                rest, cut = self.printed("--resume part"), whole.index("step   12 ")
                self.assertEqual(part.rstrip("\n"), whole[:cut].rstrip("\n"))
                self.assertEqual(rest[rest.index("step   12 ") :], whole[cut:])
                self.assertEqual(self.content("part"), self.content("whole"))
                os.remove("part")
                os.remove("whole")

    def test_a_text_that_repeats_itself_can_be_gone_on_with(self):
        names = "\n".join(SHIPPED[:1500])
        self.file("input.txt", names * 2 + "".join(SHIPPED[1500:1600]))
        flags = "--stream --vocab-size 9000 --d-model 2 --heads 1 --steps 1 --samples 0 --save run"
        self.printed(flags)
        self.assertGreater(max(map(len, microgpt.load("run").tokenizer.tokens)), 9000)

    def test_a_finished_run_only_samples_and_a_longer_one_goes_on_by_the_flags_given_anew(self):
        content, before = self.saved("--warmup-steps 2 --corpus input.txt"), os.stat("run").st_mtime_ns
        for flags in ("", "--steps 0"):
            out = self.printed(f"--resume run --samples 2 {flags}")
            self.assertEqual((out.count("loss"), out.count("sample ")), (0, 2))
            self.assertEqual((self.content("run"), os.stat("run").st_mtime_ns), (content, before))
        self.printed("--resume run --samples 1 --save other")  # a finished run has no step to save
        self.assertEqual(*(read_file(name)[0] for name in ("run", "other")))
        self.file("b.txt", "\n".join(SHIPPED[:7]))
        out = self.printed("--resume run --steps 5 --lr 0.5 --save other --corpus b.txt")
        self.assertEqual((re.findall(r"step +(\d+) /", out), out[:12]), (["4", "5"], "num docs: 7\n"))
        self.assertEqual(self.content("run"), content)
        kept = set(json.loads(read_file("other")[1]["flags"]))
        self.assertLessEqual({"--lr=0.5", "--steps=5", "--warmup-steps=2", "--corpus=b.txt"}, kept)

    def test_what_other_programs_ask_of_a_file(self):
        content, end = self.saved("--arch gpt2 --layers 2 --context 12 --vocab-size 9"), 0
        header, data = unpack(content)
        metadata, config = header.pop("__metadata__"), Config(35, 2, 16, 4, 12)
        self.assertEqual(((len(content) - len(data)) % 8, {*map(type, metadata.values())}), (0, {str}))
        self.assertEqual((metadata["format"], json.loads(metadata["config"])), ("pt", vars(config)))
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            start, end = end, end + 8 * math.prod(entry["shape"])
            self.assertEqual((entry["dtype"], entry["data_offsets"]), ("F64", [start, end]))
        self.assertEqual(end, len(data))
        for name, (rows, columns) in microgpt.gpt2_shapes(config).items():
            for name in (name, f"optimizer.m.{name}", f"optimizer.v.{name}"):
                self.assertEqual(header.pop(name)["shape"], [rows, columns] if rows > 1 else [columns])
        self.assertEqual(header, {})

    def test_weights_alone_in_single_precision_resume(self):
        header, _ = unpack(self.saved())
        weights, data = self.weights(), b""
        new = {"__metadata__": {**header["__metadata__"], "of another program": "{["}}
        for name, rows in weights.items():
            start, data = len(data), data + b"".join(struct.pack("<f", number) for number in flat(rows))
            new[name] = {"dtype": "F32", "shape": header[name]["shape"], "data_offsets": [start, len(data)]}
        self.file("run", pack(new, data))
        run = microgpt.load("run")
        self.assertEqual({*flat(run.m), *flat(run.v)}, {0.0})
        self.assertEqual(self.printed("--resume run --steps 5 --samples 1 --lr 0").count("loss"), 2)
        for name, rows in self.weights().items():
            self.assertClose(rows, weights[name], 1e-7)

    def damaged_files(self):
        """Return damaged files, each with a pattern of the error, or None if the damage may go unnoticed."""
        content = self.saved("--d-model 4 --context 4 --layers 1 --vocab-size 2")
        rng, (header, data), length = random.Random(9), unpack(content), int.from_bytes(content[:8], "little")
        tensors, metadata = read_file("run")
        change = lambda name, key, value: pack({**header, name: {**header[name], key: value}}, data)
        without = lambda dictionary, name: {key: value for key, value in dictionary.items() if key != name}
        cuts = [*range(10), *range(length + 7, length + 10), *(rng.randrange(len(content)) for _ in range(9))]
        lengths = (0, 1, 7, length - 1, length + 1, len(content), 2**32, 2**63, 2**64 - 1)
        bad = [content + b"x", content + bytes(8), bytes(100), content[8:], content * 2]
        bad += [content[:n] for n in cuts] + [n.to_bytes(8, "little") + content[8:] for n in lengths]
        bad += [pack(text, data) for text in (
            b"[" * 100_000, b"1" * 100_000, b"null", b"[]", b"{}", b"\xff", b'{"__metadata__":[]}',
            b'{"__metadata__":{},"a":{"dtype":NaN}}', b'{"%s": 1}' % (b"x" * 10_000))]
        for name, number in (("wte", math.nan), ("wpe", -math.inf), ("optimizer.v.wte", -1e-9)):
            at = len(content) - len(data) + header[name]["data_offsets"][0]
            bad.append(content[:at] + struct.pack("<d", number) + content[at + 8 :])
        for old, new in (("wpe", "wpf"), ("optimizer.v.wpe", "optimizer.w.wpe"), ("__metadata__", "a\nb")):
            bad.append(pack({new if name == old else name: entry for name, entry in header.items()}, data))
        for key, values in {
            "dtype": [None, 1, "F64x", "F32", [], "x" * 10_000],
            "data_offsets": [None, [], [1], [0, 0], [0, 1, 2], [8, 136], [-128, 0], [0.5, 1], [0, 2**63]],
            "shape": [None, 1, "F64", [], [4], [16], ["x" * 1000, 10**6], [4, 4, 1], [0, 4], [-4, -4],
                      [4.0, 4], ["4", 4], [True, 16], [[4], 4], [4, 10**18], [2, 8], [16, 1], [4, 5], {}],
        }.items():
            bad += [change("wpe", key, value) for value in values]
        flags = "--steps=x --lr=-1 --nonsense=1 --d-model=32 --heads=3 --arch=gpt2 --layers=1000000000 " \
                "--context=9 --n-embd=16.0 --save=x --resume=x --plot=x.svg --help -h names.txt"
        flags = [[*json.loads(metadata["flags"]), flag] for flag in flags.split()]
        vast, out = [[0, 0], *([26 + i, 26 + i] for i in range(60))], []
        for name, values in {
            "step": [[], -1, 10**99], "recent": [[[]], ["x"], [math.nan], [-1.0], [math.inf]],
            "random": [[], [1, 2, 3], [3, [1, 2], None]], "characters": [[], "ba", "aa", "abc"],
            "merges": [[[0, 99]], [[0]], [[-1, 0]], [["a", "b"]], vast, 2, [1, 2]],
            "flags": [[["--steps=1"]], [None], {"-h": 1}, [1.5], [], *flags],
        }.items():
            texts = ["", "null", '"x"', "[" * 5000, "1e999", "NaN", "[[0, 1]]", *map(json.dumps, values)]
            bad += [change("__metadata__", name, text) for text in texts]
            microgpt.write_safetensors("run", tensors, without(metadata, name))
            out.append((f"it was not saved by this program: no {name}", self.content("run")))
        stray = {**tensors, "stray": [[1.0]]}
        for some in (stray, without(tensors, "wpe"), without(tensors, "optimizer.m.wte")):
            microgpt.write_safetensors("run", some, metadata)
            bad.append(self.content("run"))
        for at in (rng.randrange(length + 8) for _ in range(100)):  # a flipped bit may make another digit
            flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
            out.append((None, content[:at] + flipped + content[at + 1 :]))
        out += [("it is cut short", content[:-8]), ("it holds BF16; F32", change("wpe", "dtype", "BF16"))]
        return out + [("", file) for file in bad]

    def test_a_damaged_file_is_one_line(self):
        for pattern, file in self.damaged_files():
            self.file("run", file)
            with self.subTest(pattern, file=file[:300]):
                status, out, errors = self.main("--resume run --steps 0 --samples 0")
                if status or pattern is not None:
                    self.assertEqual((status, errors.count("\n"), out, len(errors) < 250), (1, 1, "", True))
                    self.assertRegex(errors, f"^microgpt: error: cannot read run: .*{pattern or ''}")

    @needs_posix
    def test_a_vast_file_is_refused_before_its_numbers_are_read(self):
        header, _ = unpack(self.saved())
        rows = 46_000_000
        wte = {"dtype": "F32", "shape": [rows, 16], "data_offsets": [0, rows * 64]}
        for metadata, error in ((header["__metadata__"], "its matrices are not"), ({}, "not saved by this")):
            self.file("run", pack({"__metadata__": metadata, "wte": wte}, b""))
            os.truncate("run", os.path.getsize("run") + rows * 64)  # with nothing, which takes no place
            status, _, errors = self.script("--resume run", preexec_fn=limit("RLIMIT_AS", 2 << 30))
            self.assertEqual((status, errors.count("\n"), error in errors), (1, 1, True), errors)

    def test_a_save_that_failed_is_tried_again(self):
        replace, failing = os.replace, [OSError(28, "No space left on device")]
        def once(*paths):
            if failing:
                raise failing.pop()
            replace(*paths)

        with unittest.mock.patch("os.replace", once):
            status, _, errors = self.main("--steps 4 --save-every 2 --samples 0 --save run")
        self.assertEqual((status, errors[19:]), (0, "cannot save run: No space left on device\n"))
        self.assertEqual((read_file("run")[1]["step"], sorted(os.listdir())), ("4", ["input.txt", "run"]))

    def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(self):
        events, replace = [], os.replace
        with unittest.mock.patch("os.fsync", lambda file: events.append(os.fstat(file).st_size)), \
             unittest.mock.patch("os.replace", lambda *paths: events.append(paths) or replace(*paths)):
            content = self.saved()
        size, (part, target) = events
        self.assertEqual((size, target), (len(content), os.path.realpath("run")))
        self.assertEqual(os.path.dirname(part), os.path.dirname(target))
        self.assertIn(str(os.getpid()), os.path.basename(part))  # no other process uses it
        self.assertEqual(sorted(os.listdir()), ["input.txt", "run"])

    @needs_posix
    def test_links_and_modes_are_kept(self):
        self.saved()
        os.rename("run", "real")
        os.symlink("real", "run")
        for steps, mode in (("5", 0o640), ("6", 0o604)):
            os.chmod("real", mode)
            self.printed("--resume run --samples 0 --steps", steps)
            self.assertEqual(read_file("real")[1]["step"], steps)
            self.assertEqual((os.path.islink("run"), os.stat("real").st_mode & 0o777), (True, mode))
            self.assertEqual(sorted(os.listdir()), ["input.txt", "real", "run"])
        os.symlink("missing", "link")
        self.printed("--steps 1 --samples 0 --save link")
        self.assertEqual((os.path.islink("link"), read_file("missing")[1]["step"]), (True, "1"))

    def test_running_means_of_another_optimizer_are_not_used(self):
        self.saved("--optimizer momentum")  # leaves v = 0, by which adam would divide
        flags = "--resume run --steps 20 --samples 0 --schedule constant --trace run.jsonl"
        line = "microgpt: note: adam starts anew, without the running means of momentum\n"
        self.assertEqual(self.main(f"{flags} --optimizer adam")[::2], (0, line))
        self.assertLess(max(line["loss"] for line in self.trace()), 6)
        self.printed(flags)  # from now on it is adam's

    def test_weights_that_overflow_leave_the_last_good_checkpoint(self):
        content = self.saved()
        for more, step in (("--optimizer adamw --weight-decay 1e9", "3"), ("", "4")):
            self.file("run", content)
            flags = "--resume run --steps 9 --schedule constant --save-every 1 --lr 1e300"
            status, _, errors = self.main(f"{flags} {more}")
            self.assertRegex(errors.splitlines()[-1], f"^microgpt: error: .*; step {step} is saved in run$")
            self.assertEqual((status, read_file("run")[1]["step"]), (1, step))

def limit(name, size):
    """What a new process does so that its files stay below a size, as on a full disk, or its memory."""
    def limited():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(getattr(resource, name), (size, size))

    return limited

@needs_posix
class TestInterruptions(Long):
    def test_samplers_and_another_trainer_leave_a_trainer_and_its_file_alone(self):
        flags = "--steps 1000000 --save-every 1 --save run --seed"
        trainers = []
        for seed in "12":
            with open(seed, "wb") as out:
                trainers.append(self.start(f"{flags} {seed}", stdout=out))
        while not (os.path.exists("run") and self.content("1") and self.content("2")):  # both have begun
            self.assertEqual([process.poll() for process in trainers], [None, None])
        for _ in range(10):
            self.printed("--resume run --steps 0 --samples 1")
        self.assertEqual([process.poll() for process in trainers], [None, None])
        for process in trainers:
            process.terminate()
            process.wait()
        self.assertEqual([process.returncode for process in trainers], [143, 143])
        self.assertEqual(sorted(os.listdir()), ["1", "2", "input.txt", "run"])
        self.printed("--resume run --steps 0 --samples 1")

    def test_a_full_disk_is_a_warning_until_the_end_and_leaves_the_old_checkpoint(self):
        self.printed("--steps 3 --samples 0 --save run")
        content, flags = self.content("run"), "--resume run --steps 6 --save-every 2 --samples 0"
        status, out, errors = self.script(flags, preexec_fn=limit("RLIMIT_FSIZE", 20_000))
        warning, error = errors.splitlines()
        self.assertEqual(warning, "microgpt: warning: cannot save run: File too large")
        self.assertRegex(error, "^microgpt: error: cannot save run: File too large")
        self.assertEqual((status, "step    6" in out, self.content("run")), (1, True, content))
        self.assertEqual(sorted(os.listdir()), ["input.txt", "run"])

    def test_a_signal_in_training_ends_the_step_and_saves(self):
        for number in STOPS:
            process = self.start_run("--save run")
            process.send_signal(number)
            self.assertSaved(process, 128 + number, "interrupted;")

    def test_a_second_signal_ends_at_once_with_nothing_to_say(self):
        self.file("input.txt", "b" * 150)  # for which a step takes half a second or so
        process = self.start_run("--engine scalar --context 150 --save run", "step +1 ")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        self.assertIn(process.wait(), (130, 143))  # where both arrive together, either may come first
        self.assertEqual((process.stderr.read(), os.path.exists("run")), (b"", False))

    def test_a_signal_outside_of_training_ends_at_once(self):
        self.file("long.txt", "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)))
        for flags, until, line in (
            ("--steps 1 --samples 1000000 --save run", "sample 99", "interrupted; step 1 is saved in run"),
            ("--corpus long.txt --stream --vocab-size 50000", "num docs", "interrupted"),
        ):
            process = self.start_run(flags, until)
            process.send_signal(signal.SIGTERM)
            self.assertEnds(process, 143, line)

    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy does not know what was ignored at its start")
    def test_signals_that_were_ignored_stay_ignored(self):
        process = self.start_run("--save run", handler=signal.SIG_IGN)
        for number in STOPS:
            process.send_signal(number)
        self.read_until(process, r"step +\d*99 ")
        self.assertIsNone(process.poll())

    def test_whatever_takes_the_output_away_the_work_is_saved(self):
        process = self.start_run("--save run", "step +50 ")
        process.stdout.close()
        self.assertEqual((process.wait(), process.stderr.read()), (1, b""))
        self.assertGreaterEqual(self.assertGoesOn(), 49)  # that of the lost line is not made
        os.remove("run")
        with open("out", "wb") as out:  # it becomes too large, not the checkpoint
            flags = "--steps 100000 --d-model 4 --context 4 --save run"
            status, _, errors = self.script(flags, stdout=out, preexec_fn=limit("RLIMIT_FSIZE", 40_000))
        self.assertEqual((status, errors.count("\n")), (1, 1))
        self.assertRegex(errors, "^microgpt: error: cannot write the output: File too large")
        self.assertGoesOn()

# 17. Looking inside ---------------------------------------------------------------------------------------

class Explained:
    """What --explain prints: rows of words, the means, maps[layer][head] as rows of shades from 0 to 4."""
    def __init__(self, out):
        table, *maps = out[out.index("\ntoken") + 1 :].split("\n\nlayer ")
        self.lines = table.splitlines()[1:]
        *self.rows, mean = [line.split() for line in self.lines]
        self.means, self.maps = list(map(float, mean[1:])), {}
        for block in maps:
            title, _, *rows = block.rstrip().splitlines()
            shades = [["·░▒▓█".index(char) for char in row[1:] if char in "·░▒▓█"] for row in rows]
            self.maps[int(title.split(",")[0])] = [
                [row[i * t : (i + 1) * t] for t, row in enumerate(shades, 1)] for i in range(len(shades[0]))]

class TestExplain(Test):
    def test_its_numbers_and_shades_are_those_of_a_computation_by_hand(self):
        self.file("input.txt", "emma\nolivia\nava\nnoah\nliam\n")
        names = [*sorted(set("emmaolivianoah")), "^"]
        ids = [names.index(char) for char in "^emma^"]
        for arch in ("gpt2", "microgpt"):
            flags = f"--arch {arch} --layers 2 --d-model 8 --context 8 --lr 0.1 --samples 0 --explain emma"
            out, logs = self.printed(f"{flags} --steps 40 --save {arch}"), []
            got, resumed = Explained(out), self.printed(f"--samples 0 --explain emma --resume {arch}")
            self.assertEqual(out[out.index("token") :], resumed[resumed.index("token") :])
            rows, maps = by_hand(self.weights(arch), ids[:-1], 4)
            for (token, following, *numbers), i, target, p in zip(got.rows, ids, ids[1:], map(softmax, rows)):
                self.assertEqual((token, following), (names[i], names[target]))
                logs.append(-math.log(p[target]))
                best = sorted(range(len(p)), key=p.__getitem__)[:-6:-1]
                self.assertEqual(numbers[3::2], [names[i] for i in best])
                wanted = [p[target], logs[-1], logs[-1] / math.log(2), *(p[i] for i in best)]
                for a, b in zip(numbers[:3] + numbers[4::2], wanted):
                    self.assertAlmostEqual(float(a), b, delta=6e-4)
            for a, b in zip(got.means, [sum(logs) / 5, sum(logs) / 5 / math.log(2)]):
                self.assertAlmostEqual(a, b, delta=6e-4)
            shades = [[[[round(4 * p) for p in row] for row in head] for head in heads] for heads in maps]
            self.assertEqual(got.maps, dict(enumerate(shades)))
        self.assertGreater(len({shade for rows in shades[1] for shade in rows[4]}), 2)  # not all the same

    def test_odd_characters_keep_to_their_columns(self):
        text = "a\t \\'\"é☃a^bcdefg"
        self.file("input.txt", f"{text}\n{text}")
        for more in "--heads 12", "--heads 1 --merges 2", "--context 99 --lr 1e3":
            out = self.printed(f"--d-model 24 --steps 6 --samples 0 {more}", "--explain", text * 6)
            got = Explained(out)
            self.assertEqual([len(rows) for rows in got.maps[0]], [len(got.rows)] * len(got.maps[0]))
            self.assertEqual(re.findall("inf|nan", out), [])
            self.assertTrue(all(line.isprintable() for line in out.split("\n")[4:]))
            self.assertEqual(len({line.index(".") for line in got.lines[:-1]}), 1)

    def test_a_text_longer_than_the_context_is_explained_up_to_there(self):
        for flags, pairs in (("--context 4 --explain emmaava", "^e em mm ma"), ("--explain=", "^^"),
                             ("--stream --context 4 --explain av", "av")):
            got = Explained(self.printed(f"--steps 1 --samples 0 {flags}"))
            self.assertEqual(["".join(row[:2]) for row in got.rows], pairs.split())

class Picture:
    """A picture: its curves in places, and as (step, loss) read off the ticks."""
    def __init__(self, svg):
        self.svg, root = svg, ElementTree.fromstring(svg.encode())  # fails on what is no XML
        self.up, self.across = [], []
        pairs = lambda text: [tuple(map(float, pair.split(","))) for pair in text.split()]
        for text in root.findall("{*}text"):
            (place,) = pairs(text.get("transform")[len("translate(") : -1])
            (self.up if text.get("x") == "-50" else self.across).append((*place, float(text.text)))
        self.curves = {group.get("class"): pairs(group.find("{*}polyline").get("points"))
                       for group in root.findall("{*}g")}

    def data(self, name):
        (_, y1, loss1), *_, (_, y2, loss2) = self.up
        (x1, _, step1), *_, (x2, _, step2) = self.across
        across, up = (step2 - step1) / (x2 - x1), (loss2 - loss1) / (y2 - y1)
        return [(step1 + (x - x1) * across, loss1 + (y - y1) * up) for x, y in self.curves[name]]

class TestPlot(Test):
    def test_curves_and_ticks_of_any_losses(self):
        rng, cases = random.Random(2), [([], []), ([], [(50, 2.5)]), ([(9, 0.0)], []), ([(1, 1e99)] * 3, [])]
        for n in [1, 2, 3, 10, 100, 1000] * 20:
            first, (low, high) = int(10 ** rng.uniform(0, 6)), [10 ** rng.uniform(-6, 6) for _ in "ab"]
            points = [(step, rng.uniform(low, high)) for step in range(first, first + n)]
            cases.append((points, points[1::2]))
        for points, validations in cases:
            picture = Picture(microgpt.loss_plot(points, validations))
            self.assertNotRegex(picture.svg, '"[^"]*(nan|inf)')
            self.assertEqual([len(curve) for curve in picture.curves.values()],
                             [len(points), len(points), len(validations)])
            places = chain(*picture.curves.values())
            self.assertTrue(all(70 <= x <= 770 and 50 <= y <= 450 for x, y in places))
            for numbers in [loss for *_, loss in picture.up], [step for *_, step in picture.across]:
                for gap in (b - a for a, b in zip(numbers, numbers[1:])):
                    self.assertIn(round(float(f"{gap:e}".split("e")[0]), 2), (1, 2, 5, 10), numbers)
                self.assertLessEqual(len(numbers), 11)
            for name, wanted in ("loss", points), ("validation", validations):
                if len(points) > 9:
                    for (x, y), (step, loss) in zip(picture.data(name), wanted):
                        self.assertAlmostEqual(x, step, delta=len(points) / 500)
                        self.assertAlmostEqual(y, loss, delta=abs(high - low) / 500)
        means = Picture(microgpt.loss_plot([(i, i % 2 + 1.0) for i in range(900)], [])).data("mean")
        self.assertTrue(all(abs(mean - 1.5) < 0.02 for _, mean in means[100:]))

    def test_the_command_line_draws_its_losses_even_where_it_ends_early(self):
        watched = "--steps 30 --val-fraction 0.4 --eval-every 7 --div-warn 1e9"
        for status, flags, curves in ((0, watched, [30, 30, 5]), (1, "--optimizer sgd --lr 1e99", [3, 3, 0])):
            self.file("run.svg", "of another run")
            got, out, _ = self.main(f"{flags} --samples 0 --plot run.svg")
            picture = Picture(self.content("run.svg").decode())
            self.assertEqual((got, list(map(len, picture.curves.values()))), (status, curves))
            for (x, y), (step, loss) in zip(picture.data("loss") * (not status), enumerate(losses(out), 1)):
                self.assertAlmostEqual(x, step, delta=0.1)
                self.assertAlmostEqual(y, float(loss), delta=0.01)
            self.assertEqual(sorted(os.listdir()), ["input.txt", "run.svg"])

class TestTrace(Long):
    def test_its_numbers_are_those_of_the_run_and_gradients_those_before_clipping(self):
        flags = "--steps 12 --batch-size 3 --warmup-steps 4 --seed 7 --samples 0 --clip-grad 0.1"
        self.file("run.jsonl", '{"step": 1, "of": "another run"}\n')
        self.printed("--steps 0 --seed 7 --samples 0 --save run")
        out, lines, docs = self.printed(f"{flags} --trace run.jsonl"), self.trace(), SHIPPED[:60]
        self.assertEqual(losses(out), [f"{line['loss']:.4f}" for line in lines])
        tokenizer = CharTokenizer(docs)
        random.Random(7).shuffle(docs)
        for step, line in enumerate(lines):
            batch = docs[3 * step :][:3]
            self.assertEqual((line["step"], line["documents"]), (step + 1, batch))
            self.assertEqual(line["tokens"], [[25, *tokenizer.encode(doc), 25] for doc in batch])
            self.assertAlmostEqual(line["learning_rate"], 0.01 * min((step + 1) / 4, 1 - (step - 4) / 8), 15)
            self.assertEqual("gradients" in line, step == 0)
        loss, grads = microgpt.loss_and_grads(Config(26), self.weights(), lines[0]["tokens"])
        for name, rows in grads.items():
            self.assertClose(lines[0]["gradients"][name], rows, 1e-12)
        told, norm = lines[0], math.sqrt(sum(g * g for rows in grads.values() for g in flat(rows)))
        self.assertClose([[told["loss"], told["gradient_norm"]]], [[loss, norm]], 1e-12)
        self.assertEqual(list(told["gradients"]), list(grads))

    def test_it_has_all_that_a_port_needs(self):
        layer = "linear linear linear attention linear __add__ rmsnorm linear relu linear __add__ ".split()
        lean = ["embed", "embed", "__add__", "rmsnorm", "rmsnorm", *layer, "linear", "cross_entropy"]
        other = "--stream --vocab-size 9 --arch gpt2 --batch-size 2 --workers 2"
        for flags, names in (("", lean), (other, None)):
            self.printed(f"{flags} --steps 0 --samples 0 --save start")
            self.printed(f"{flags} --steps 2 --samples 0 --trace run.jsonl")
            first, step = json.loads(self.content("run.jsonl").splitlines()[0]), self.trace()[0]
            metadata = read_file("start")[1]
            for name in ("characters", "merges", "config", "random"):
                self.assertEqual(first[name], json.loads(metadata[name]))
            self.assertEqual((first["step"], first["weights"]), (0, self.weights("start")))
            self.assertEqual(first["bos"], first["config"]["vocab_size"] - 1)
            told, results = zip(*step["operations"])
            self.assertEqual(list(told), names or list(told))
            self.assertAlmostEqual(results[-1], step["loss"], 12)
            model, config = microgpt.MODELS["gpt2" if "gpt2" in flags else "microgpt"][0], first["config"]
            w, rows = {name: Tensor(rows) for name, rows in first["weights"].items()}, step["tokens"]
            config, got = Config(**config), []
            for row in rows:
                cache, n = microgpt.new_cache(config), len(row) - 1
                got += model(config, w, row[:-1], range(n), [cache] * n).data
            self.assertClose(got, results[-2], 1e-12)
            microgpt.tape.clear()

    def test_a_resumed_run_goes_on_after_its_step_and_cuts_what_is_beyond(self):
        flags = "--samples 0 --schedule constant --batch-size 2 --trace"
        self.printed(f"--steps 9 {flags} whole.jsonl")
        self.printed(f"--steps 4 {flags} run.jsonl --save run")
        whole, four, checkpoint = map(self.content, ("whole.jsonl", "run.jsonl", "run"))
        begin, whole = four.splitlines(True)[0], whole[whole.index(b"\n") + 1 :]
        self.assertEqual(four, begin + whole[: len(four) - len(begin)])
        lines, rest = [begin, *whole.splitlines(True)], whole[len(four) - len(begin) :]
        beyond = b"".join(lines[5:7]).replace(b'"loss"', b'"lost"')
        more = b"", beyond, lines[5][:40], beyond + lines[7][:-1], beyond + b"\xff\x00"
        torn = b"".join(lines[:4]) + rest  # where a disk was full in step 4
        cases = [(four + each, begin + whole) for each in more]
        for before, after in [*cases, (four[:-9], torn), (b"", None)]:
            self.file("run.jsonl", before)
            self.file("run", checkpoint)
            self.printed(f"--resume run --steps 9 {flags} run.jsonl")
            got = self.content("run.jsonl")
            self.assertEqual(got if after else got[got.index(b"\n") + 1 :], after or rest, before)

    def test_each_line_is_there_when_its_step_is_done_and_no_file_is_left_open(self):
        process = self.start_run("--trace run.jsonl", "step +20 ")
        process.kill()
        lines = self.content("run.jsonl").splitlines()[:20]
        self.assertEqual([json.loads(line)["step"] for line in lines], [*range(20)])
        flags = "--steps 4 --samples 0 --val-fraction 0.2 --plot a.svg --trace a.jsonl --save run"
        status, _, errors = self.script(SCRIPT, *flags.split(), script="-Wdefault")
        self.assertEqual((status, errors), (0, ""))

# 18. The command line -------------------------------------------------------------------------------------

class TestPrompts(Test):
    def test_tokens_come_as_often_as_temperature_and_top_k_say(self):
        self.file("input.txt", "abcd")
        self.printed("--stream --context 1 --d-model 1 --heads 1 --steps 0 --samples 0 --save run")
        tensors, metadata = read_file("run")

        def drawn(z, flags):
            """The tokens of a model for which every token, a to d, is followed by one with these logits."""
            new = {"wte": [[1e3]] * 5, "wpe": [[0.0]], "lm_head": [[a] for a in (*z, -1e299)],
                   "layer0.attn_wo": [[0.0]], "layer0.mlp_fc2": [[0.0] * 4]}
            microgpt.write_safetensors("run", {**tensors, **new}, metadata)
            return self.printed(f"--resume run --samples 1 {flags}").split("sample  1: ")[1].rstrip("\n")

        for temperature in (0.5, 1.0, 2.0):
            text = drawn([0.0, 1.0, -2.0, 0.5], f"--max-tokens 4000 --temperature {temperature}")
            for char, p in zip("abcd", softmax([0.0, 1.0, -2.0, 0.5], temperature)):
                self.assertLess(abs(text.count(char) / 4000 - p), 4 * math.sqrt(p * (1 - p) / 4000))
        for k, left in ((1, "b"), (2, "abc"), (3, "abc"), (4, "abcd"), (9, "abcd"), (0, "abcd")):
            text = drawn([1.0, 2.0, 1.0, 0.0], f"--max-tokens 300 --temperature 3 --top-k {k}")
            self.assertEqual("".join(sorted(set(text))), left)
        self.assertEqual(drawn([0.0, 3.0, 2.9, 0.0], "--max-tokens 20 --temperature 0"), "b" * 20)
        self.assertEqual(drawn([1e299, -1e299, 0.0, 0.0], "--max-tokens 20 --temperature 1e-300"), "a" * 20)

    def test_past_the_context_the_window_slides_and_without_a_prompt_a_text_begins_as_after_a_line(self):
        self.file("text.txt", "abcabd\taecb\n" * 9)
        chars = sorted("\t\nabcde")
        for size in (1, 5, 6):
            flags = f"--corpus text.txt --stream --context {size} --steps 30 --lr 0.3 --temperature 0"
            self.printed(f"{flags} --samples 0 --save run{size}")
            for prompt in ("", "ab", "abcabdaecbd"):
                out = self.printed(f"--resume run{size} --max-tokens 12 --samples 1 --prompt={prompt}")
                past, start = [chars.index(char) for char in prompt or "\n"], 0  # where the window begins
                for _ in range(12):
                    if len(past) - start > size:
                        start = len(past) - (size + 1) // 2
                    row = by_hand(self.weights(f"run{size}"), past[start:], 4)[0][-1]
                    past.append(row.index(max(row)))
                text = prompt + "".join(chars[i] for i in past[-12:])
                self.assertEqual(out.split("sample  1: ")[1], text + "\n")

class TestCorpus(Test):
    def test_globs_are_merged_sorted_and_each_file_is_read_once(self):
        os.makedirs("deep/er")
        for name, text in (("a.txt", "x\ny\n"), ("b.txt", "z\n"), ("deep/er/c.txt", "w\nv\n")):
            self.file(name, text)
        globs = ["b.txt", "./a.txt", "?.txt", "a.txt"], ["[ab].txt"], ["**/*.txt"]
        first, second, third = [self.printed("--steps 9 --samples 2", *[f"--corpus={glob}" for glob in each])
                                for each in globs]
        self.assertEqual((first, first[:26]), (second, "num docs: 3\nvocab size: 4\n"))
        self.assertTrue(third.startswith("num docs: 65\n"), third)
        for i, name in enumerate(("it's a\n'name'.txt", "a[1]*.txt", "é☃.txt", "-x.txt", "%s {}.txt"), 1):
            self.file(name, "ab\n" * i)
            for flags in ([f"--corpus={name}", f"--save={name}s"], [f"--resume={name}s"]):
                self.assertIn(f"num docs: {i}\n", self.printed("--steps 1 --samples 1", *flags))

    def test_a_glob_that_finds_no_end_is_refused(self):
        with unittest.mock.patch("microgpt.iglob", lambda *_, **__: map("{}.txt".format, count())):
            self.assertRefused(1, "too many", "--corpus *.txt")

    def test_a_stream_is_the_text_as_it_is_and_documents_are_its_lines(self):
        self.file("a.txt", "\ufeffone\r\n\r\n two \n")
        self.file("b.txt", "34")
        flags = "--corpus a.txt --corpus b.txt --context 12 --steps 1 --samples 0 --trace run.jsonl"
        for more, wanted in (("3", ["34", "one", "two"]), ("1 --stream", ["one\n\n two \n34"])):
            self.assertIn(f"num docs: {len(wanted)}\n", self.printed(f"{flags} --batch-size {more}"))
            self.assertEqual(sorted(self.trace()[0]["documents"]), wanted)

    def test_windows_of_a_stream_depend_on_the_seed_and_the_step_and_come_from_all_of_it(self):
        path, windows = self.file("text.txt", letters := "abcdefghijklmnopqrstuvwxyz"), []
        flags = f"--corpus {path} --stream --context 4 --samples 0 --batch-size 8 --trace run.jsonl"
        for more in ("20", "20", "10", "20 --seed 7"):
            self.printed(f"{flags} --steps {more}")
            windows.append([window for line in self.trace() for window in line["documents"]])
        self.assertEqual((windows[0], windows[0][:80]), (windows[1], windows[2]))
        self.assertNotEqual(windows[0], windows[3])
        self.assertEqual(set(windows[0]), {letters[i : i + 5] for i in range(22)})

    @unittest.skipUnless(os.path.exists("/dev/stdin"), "needs /dev/stdin")
    def test_a_pipe_is_a_corpus(self):
        read_end, write_end = os.pipe()
        os.write(write_end, b"ab\nc\n")
        os.close(write_end)
        status, out, errors = self.script("--corpus /dev/stdin --steps 1 --samples 0", stdin=read_end)
        os.close(read_end)
        self.assertEqual((status, errors, out[:12]), (0, "", "num docs: 2\n"))

    def test_input_txt_is_that_of_the_current_folder_or_the_shipped_one(self):
        self.assertIn("num docs: 60\n", self.printed("--steps 1 --samples 0"))
        os.remove("input.txt")
        self.assertIn(f"num docs: {len(SHIPPED)}\nvocab size: 27\n", self.printed("--steps 1 --samples 1"))
        status, out, errors = self.script(script=shutil.copy(SCRIPT, "alone.py"))  # with none beside it
        self.assertEqual((status, out, os.listdir()), (1, "", ["alone.py"]))
        self.assertRegex(errors, "^microgpt: error: .*input.txt[^\n]*\n$")

class TestValidation(Test):
    def validated(self, flags, ids):
        """Train, and hold the validation loss against one by hand: the mean over all tokens of some documents
        but the first of each. Returns the documents trained on."""
        out = self.printed(f"--val-fraction {flags} --div-warn 1e9 --samples 0 --save run --trace run.jsonl")
        trained, logs = {doc for line in self.trace() for doc in line["documents"]}, []
        for document in ids(trained):
            rows = by_hand(self.weights(), document[:-1], 4)[0]
            logs += [-math.log(softmax(row)[target]) for row, target in zip(rows, document[1:])]
        self.assertEqual(f"{statistics.mean(logs):.4f}", re.search(r"validation (\S+)\n", out)[1])
        os.remove("run")
        return trained

    def test_held_out_documents_are_never_trained_on_and_validation_is_the_mean_over_their_tokens(self):
        docs = ["a", "bc", "cab" * 9, "bbbb", "ccccab" * 3, "ab", "acab", "cc", "aab", "abcabcabcabcabcabc"]
        self.file("input.txt", "\n".join(docs))
        others = lambda trained: [doc for doc in docs if doc[:16] not in {other[:16] for other in trained}]
        ids = lambda trained: [[3, *map("abc".index, doc), 3][:17] for doc in others(trained)]
        for fraction, n in ((0.3, 3), (0.01, 1), (0.9, 9)):
            trained = self.validated(f"{fraction} --steps 20 --batch-size 2 --eval-every 20", ids)
            self.assertEqual((len(trained), len(others(trained))), (10 - n, n))

    def test_the_end_of_a_stream_is_held_out_in_windows(self):
        text = "".join(random.Random(1).choices("abc", k=110)) + "d" * 10
        end, flags = list(map("abcd".index, text[96:])), f"--corpus {self.file('text.txt', text)} --stream"
        windows = lambda trained: [end[start : start + 5] for start in range(0, 23, 4)]
        trained = self.validated(f"0.2 {flags} --context 4 --steps 30 --batch-size 8", windows)
        self.assertNotIn("d", "".join(trained))

    def test_the_loss_beside_it_is_the_mean_since_the_one_before(self):
        out = self.printed("--steps 7 --eval-every 3 --val-fraction 0.2 --div-warn 1e9 --samples 0")
        each, told = list(map(float, losses(out))), re.findall(r"loss (\S+) on average", out)
        self.assertEqual(re.findall(r"step +(\d) / +7 \| loss \S+ on", out), ["3", "6", "7"])
        for mean, part in zip(told, (each[:3], each[3:6], each[6:])):
            self.assertAlmostEqual(float(mean), statistics.mean(part), delta=1.01e-4)

    def test_the_gap_that_warns_and_the_gap_that_stops(self):
        flags = "--corpus text.txt --stream --steps 12 --eval-every 12 --lr 0.05 --samples 0"
        for n, low, high in ((4, 10, 20), (7, 20, 99)):
            self.file("text.txt", "aab" * 100 + "abb" * n + "aab" * (12 - n))
            _, out, errors = self.main(f"{flags} --div-warn 0")
            loss, validation = map(float, re.search(r"loss (\S+) on .* validation (\S+)\n", out).groups())
            gap = int(re.search(r"at step 12 the validation loss is (\d+) % above the training", errors)[1])
            self.assertAlmostEqual(gap, (validation / loss - 1) * 100, delta=0.6)
            self.assertTrue(low < gap < high, gap)
            for more, status, word in (
                ("--val-fraction 0.1", 0, "warning" if gap > 20 else ""), (f"--div-warn {gap + 1}", 0, ""),
                (f"--div-crit {gap - 1} --save run", 1, "error"),
                (f"--div-crit {gap + 1} --div-warn {gap - 1}", 0, "warning"),
            ):
                got, _, errors = self.main(f"{flags} {more}")
                self.assertEqual((got, errors.count("\n")), (status, word != ""), more)
                self.assertRegex(errors, f"^microgpt: {word}: at step 12 " if word else "^$")
                self.assertEqual("; step 12 is saved in run\n" in errors, word == "error")

    def test_watching_changes_neither_the_losses_nor_the_last_samples(self):
        watching = "--gen-every 5 --save-every 3 --save run --trace run.jsonl --plot run.svg"
        plain, watched = (self.printed(f"--steps 12 --samples 3 {flags}") for flags in ("", watching))
        self.assertEqual(losses(plain), losses(watched))
        self.assertEqual(len(re.findall(r"^sample at step (5|10): ", watched, re.M)), 2)
        self.assertEqual(*(out[out.index("--- inference") :] for out in (plain, watched)))
        flags = "--steps 12 --val-fraction 0.2 --stream --context 4 --div-warn 1e9 --eval-every"
        self.assertEqual(*(losses(self.printed(f"{flags} {n}")) for n in (3, 12)))

DEFAULTS = "--vocab-size 0 --layers 1 --d-model 16 --heads 4 --context 16 --arch microgpt --steps 1000 " \
           "--batch-size 1 --optimizer adam --lr 0.01 --beta1 0.85 --beta2 0.99 --eps 1e-08 --workers 1 " \
           "--weight-decay 0.01 --schedule linear --warmup-steps 0 --clip-grad 0 --seed 42 --engine tensor " \
           "--val-fraction 0 --eval-every 100 --save-every 500 --samples 20 --temperature 0.5 --top-k 0"
NO_FLAGS = {"corpus": "input.txt", "div-warn": "20", "max-tokens": "the context"}  # are no flags
SIZES = "--layers --d-model --heads --context --batch-size --max-tokens --workers --save-every".split()
NUMBERS = "--lr --temperature --clip-grad --weight-decay --div-warn --div-crit".split()
REFUSALS = [  # status, pattern of the one line of error, flags
    (1, "cannot read missing", "--corpus missing"), (1, r"cannot read no-\*.txt", "--corpus no-*.txt"),
    *[(1, f"too little text in {name}.txt$", f"--corpus {name}.txt") for name in ("empty", "blank")],
    (1, "cannot read latin.txt: 'utf-8' codec can't decode byte 0xe9", "--corpus latin.txt"),
    (1, "cannot read folder.svg", "--corpus folder.svg"), (1, "no file", f"--corpus {os.devnull}"),
    (1, "too short for a context of 2", "--corpus short.txt --stream --context 2"),
    (1, "too little text in short.txt$", "--corpus short.txt --val-fraction 0.1"),
    (1, "too short for a context of 2", "--corpus 5.txt --stream --context 2 --val-fraction 0.1"),
    (1, "the character 'É'", "--prompt É"), (1, "the character '☃'", "--explain ☃"),
    (2, "two tokens", "--stream --context 4 --explain e"),
    (2, "--heads 3 does not divide --d-model 16", "--heads 3"), (2, "arguments: --nonsense", "--nonsense"),
    (2, "arguments: --temp", "--temp 1"), (2, "3 is more than --batch-size 2", "--batch-size 2 --workers 3"),
    *[(2, f"{flag}\\b.*'{value}' is no whole number from 1", f"{flag}={value}")
      for flag in SIZES for value in ("0", "-1", "x", "1.5", "")],
    *[(2, f"{flag}\\b.*number from 0", f"{flag}={value}")
      for flag in NUMBERS for value in ("-1", "nan", "inf", "x", "")],
    *[(2, f"{flag}\\b.*from 0 to below 1", f"{flag}={value}")
      for flag in ("--beta1", "--beta2", "--val-fraction") for value in ("-1", "1", "nan")],
    *[(2, f"{name}.*invalid choice", f"--{name} gpt5") for name in "arch engine optimizer schedule".split()],
    *[(2, flags.split("=")[0], flags) for flags in (
        "--eps=-1", "--warmup-steps=-1", f"--steps={'9' * 5000}", "--save=",
        "--plot=input.txt", "--plot=", "--plot=folder.svg", "--trace=run.svg")],
    *[(2, "the model is too large", flags)
      for flags in ("--d-model 99999 --heads 1", "--layers 999999", "--context 999999999")],
    *[(2, "writable folder, not 'nowhere", f"--{flags}")
      for flags in ("save nowhere/a", "plot nowhere/a.svg", "trace nowhere/a.jsonl")],
    (1, "input.txt", "--save input.txt"),
    (1, "cannot read input.txt/", "--save input.txt/"),
    (1, "missing", "--resume missing"), (1, "input.txt", "--resume input.txt"), (1, "''|read", "--resume="),
    (1, r"cannot read \.", "--save ."), (1, "the character 'é'", "--resume run --steps 9 --corpus greek.txt"),
    (2, "run was made with another --stream$", "--resume run --stream"),
    *[(2, f"run was made with another --{name}$", f"--resume run --{name} {new}")
      for name, new in (("layers", 2), ("d-model", 32), ("heads", 2), ("context", 8), ("arch", "gpt2"),
                        ("vocab-size", 5))],
]

class TestCommandLine(Test):
    @unittest.skipUnless(os.path.exists(GOLDEN), "needs what the reference prints, in ../shared")
    def test_the_default_run_prints_what_the_reference_prints(self):
        shutil.copy(NAMES, "input.txt")
        status, out, errors = self.script(env={"PYTHONUNBUFFERED": ""})
        self.assertEqual((status, errors, out.count("\r")), (0, "", 1000))
        self.assertEqual(re.sub("\r\n?", "\n", out), read(GOLDEN))

    def test_the_engines_and_archs_print_the_same(self):
        for arch in ("microgpt", "gpt2"):
            flags = f"--arch {arch} --steps 5 --batch-size 2 --layers 2 --d-model 8 --context 5 --samples 3"
            self.assertEqual(*(self.printed(f"{flags} --engine {engine}") for engine in ("scalar", "tensor")))

    def test_every_flag_changes_the_run_and_a_seed_repeats_it(self):
        always = "--steps 6 --samples 2 --val-fraction 0.2 --div-warn 1e9"
        runs = [self.printed(f"{always} {flags}") for flags in (
            "", "--stream --context 8", "--merges 1", "--n-layer 2", "--n-embd 8", "--n-head 2",
            "--block-size 4", "--arch gpt2", "--steps 5", "--batch-size 2", "--optimizer sgd", "--lr 0.1",
            "--optimizer momentum", "--optimizer rmsprop", "--optimizer adamw --weight-decay 0.5",
            "--beta1 0.1", "--beta2 0.1", "--eps 0.1", "--cosine", "--schedule constant", "--seed 7",
            "--warmup-steps 3", "--clip-grad 0.1", "--val-fraction 0.4", "--eval-every 4", "--gen-every 4",
            "--temperature 2", "--top-k 2", "--prompt m", "--max-tokens 3", "--samples 3")]
        self.assertEqual(len(set(runs)), len(runs))
        same = "--seed 42", "--clip-grad 0.1 --no-clip-grad", "--cosine --schedule linear"
        self.assertEqual({self.printed(f"{always} {flags}") for flags in same}, {runs[0]})

    def test_the_long_command_line_of_the_design_and_going_on_with_it(self):
        flags = "--stream --steps 6 --vocab-size 1000 --warmup-steps 3 --cosine --div-crit 50 --gen-every 3"
        for flags, steps in (flags, "123456"), ("--resume run --steps 9", "789"):
            status, out, errors = self.main(f"{flags} --samples 1 --save run")
            self.assertEqual((status, re.findall(r"step +(\d) / +\d \| loss \S+\r", out)), (0, list(steps)))
            self.assertEqual(errors, "")
            self.assertRegex(out, rf"step +{steps[-1]} / +\d \| loss \S+ on average \| validation ")
            self.assertRegex(out, rf"\nsample at step {steps[-1]}: (?s:.)*--- inference .* text\) ---\nsam")

    def test_help_names_every_group_and_the_defaults_that_there_are(self):
        status, out, errors = self.script("--help", env={"COLUMNS": "300"})
        self.assertEqual((status, errors), (0, ""))
        for group in ("basics", "data", "model", "training", "watching", "keeping", "sampling", "engine"):
            self.assertIn(f"\n{group}:\n", out)
        self.assertNotRegex(out, "object at|None|%%")
        out = re.sub(r"\n {9,}", "  ", out)  # what stands below a long flag
        told = dict(re.findall(r"^  --([a-z0-9-]+).*?  +[^-].* \(([^()]*)\)$", out, re.M))
        self.assertEqual(told, {**dict(re.findall(r"--(\S+) (\S+)", DEFAULTS)), **NO_FLAGS})
        self.printed("--steps 3 --samples 1 --save run")
        self.printed(f"{DEFAULTS} --steps 3 --samples 1 --save same")
        self.assertEqual(self.content("run"), self.content("same"))

    def test_what_is_refused(self):
        self.printed("--steps 3 --samples 0 --vocab-size 9 --save run")
        for name, content in {"empty.txt": "", "blank.txt": "\n  \n\r\n\t\n", "latin.txt": b"caf\xe9\n",
                              "short.txt": "ab", "5.txt": "abcde", "greek.txt": "aé"}.items():
            self.file(name, content)
        os.makedirs("folder.svg")
        before = {name: self.content(name) for name in os.listdir() if name != "folder.svg"}
        for status, pattern, flags in REFUSALS:
            with self.subTest(flags[:60]):
                self.assertRefused(status, pattern, flags)
        for flags in ("--lr", "--save-every", "--arch", "--nonsense", "--resume", "--corpus", "--plot"):
            status, _, errors = self.main(flags, "7" * 5000)  # at most 100 characters are quoted
            self.assertEqual((status > 0, errors.count("\n"), "7" * 101 in errors), (True, 1, False), flags)
        self.assertEqual({name: self.content(name) for name in os.listdir() if name != "folder.svg"}, before)
        error = "microgpt: error: --heads 3 does not divide --d-model 16\n"
        self.assertEqual(self.script("--heads 3"), (2, "", error))
        _, _, error = self.script("--prompt ☃", env={"PYTHONIOENCODING": "ascii"})  # which cannot show it
        self.assertEqual((error[:16], error.count("\n")), ("microgpt: error:", 1))

    def test_what_ends_a_run(self):
        for pattern, flags in (("at step [23], .* overflowed", "--lr 1e300"),
                               ("overflowed", "--lr 1e308 --steps 1"),
                               ("overflowed", "--lr 1e308 --steps 1 --samples 0 --explain emma")):
            status, _, errors = self.main(flags)
            self.assertEqual((status, errors.count("\n")), (1, 1), errors)
            self.assertRegex(errors, f"^microgpt: error: .*{pattern}")

    def test_main_leaves_the_process_as_it_was_and_works_in_any_thread(self):
        state = lambda: [gc.isenabled(), *map(signal.getsignal, STOPS)]
        before = state()
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(self.main, "--steps 2 --samples 1").result()
        self.assertEqual((got, before), ((0, self.printed("--steps 2 --samples 1"), ""), state()))

    @needs_posix
    def test_memory_does_not_grow_with_the_steps(self):
        driver = self.driver("import resource\nstatus = microgpt.main()\n"
                             "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n")
        flags = "--engine scalar --d-model 4 --context 8 --samples 0 --steps"
        few, many = (int(self.script(flags, n, script=driver)[1].split()[-1]) for n in ("20", "150"))
        self.assertLess(many / few, 2)

@needs_posix
class TestTerminal(Long):
    def test_progress_and_ctrl_c_are_told_on_a_terminal_alone(self):
        terminal, end = os.openpty()
        self.addCleanup(os.close, terminal)
        with open("out", "wb") as out:
            process, shown = self.start("--steps 1000000 --plot run.svg", stdout=out, stderr=end), b""
        os.close(end)
        while not re.search(rb"\d steps/s, \d+ s left", shown):
            shown += os.read(terminal, 10000)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # nobody is at the other end any more
            while more := os.read(terminal, 10000):
                shown += more
        self.assertEqual(process.wait(), 130)
        self.assertNotIn(b"steps/s", self.content("out"))
        lines = shown.decode().splitlines()
        self.assertIn("microgpt: finishing this step; a second time ends at once", lines)
        self.assertEqual(lines[-1], "microgpt: interrupted; nothing was saved")
        self.assertIn("loss", Picture(self.content("run.svg").decode()).curves)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_behind_the_output_is_one_line(self):
        for unbuffered in ("", "1"):
            env = {"PYTHONUNBUFFERED": unbuffered}
            with open("/dev/full", "w") as full:
                status, _, errors = self.script("--steps 1", stdout=full, env=env)
                self.assertEqual(status, 1)
                self.assertRegex(errors, "^microgpt: error: cannot write the output: [^\n]*\n$")
            reader, writer = os.pipe()
            os.close(reader)
            for flags in ("--help", "--prompt 9"):
                self.assertIn(self.script(flags, stdout=writer, env=env)[::2], ((0, ""), (1, "")), flags)
            os.close(writer)

    def test_output_that_is_closed_from_the_start(self):
        for closed, flags, status, errors in ((">&-", "--steps 2 --save run --trace run.jsonl", 0, 0),
                                              (">&-", "--nonsense", 2, 1), (">&-", "--help", 0, 0),
                                              ("2>&-", "--nonsense", 2, 0), (">&- 2>&-", "--steps 1", 0, 0)):
            command = f'"$0" "$@" {closed}', sys.executable, SCRIPT, *flags.split()
            got = self.script("", *command, script="-c", executable="/bin/sh")
            self.assertEqual((got[0], got[1], got[2].count("\n")), (status, "", errors), closed)
            self.assertNotIn("Traceback", got[2])
        self.assertEqual([line["step"] for line in self.trace()], [1, 2])
        self.assertEqual(len(self.weights()), 9)

# README ---------------------------------------------------------------------------------------------------

def readme_commands():
    """Each command of the README as a list of words, and the lines that it shows below it."""
    text = read(README).replace("\\\n", "")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    blocks += re.findall(r"`(python microgpt.py [^`]+)`", text)
    for block in blocks:
        start = "$ python " if block.startswith("$") else "python "
        for part in block[len(start) :].split("\n" + start) if block.startswith(start) else ():
            command, _, shown = part.partition("\n")
            yield shlex.split(command, comments=True)[1:], shown.splitlines()

EXERCISES = {  # number -> edits of the source, flags
    1: ([], ["--heads 1", "--heads 1 --steps 4000 --eval-every 4000", "--steps 4000 --eval-every 4000"]),
    2: ([("x = x + found.linear(", "x = found.linear("), ("x = x + hidden.linear(", "x = hidden.linear(")],
        ["", "--layers 4"]),
    3: ([('+ w["wpe"].embed(positions)             #', '+ w["wpe"].embed([0] * len(ids))  #')],
        ["", "--steps 4000 --eval-every 4000"]),
    4: ([], ["--temperature 0.1", "--temperature 2"]),
    5: ([], ["--optimizer sgd", "--optimizer sgd --lr 0.3", "--optimizer sgd --lr 1"]),
    6: ([], ["--val-fraction 0.99 --eval-every 4000 --steps 4000"]),
    7: ([("rng.shuffle(docs)\n    whole", "docs.sort()\n    whole")], [""]),
    8: ([("rng.gauss(0, 0.08)", "rng.gauss(0, 0.0)")], [""]),
    9: ([
        ("probabilities(row[: past + t + 1])", "probabilities(row)"),
        ("ps.append([row + [0.0] * (past + len(scores) - len(row)) for row in shares])", "ps.append(shares)"),
    ], [""]),
}

MISTAKES = [  # each of the porting section, in its order: what of part one is replaced, and by what
    [("            values.append(v.rows[t])\n", "            values.append(v.rows[t])\n"
      "        for t, (keys, values) in enumerate(caches):\n")],
    [("normed = x.rmsnorm()", "normed = x")],
    [("hidden = x.rmsnorm()", "hidden = x")],
    [('x.linear(w["lm_head"])', 'x.rmsnorm().linear(w["lm_head"])')],
    [("    x = x.rmsnorm()", "    x = x")],
    [("x = x + found", "x = normed + found")],
    [(" / math.sqrt(size) for key in keys", " for key in keys")],
    [("n_head: int = 4", "n_head: int = 1")],
    [("slice(start, start + size)", "slice(start // size, None, n_head)")],
    [("q.attention(k, v,", "k.attention(q, v,")],
    [("add_up(losses) / len(losses)", "add_up(losses) / 16")],
    [("add_up(losses) / len(losses)", "add_up(losses)")],
    [("tokenizer.encode(doc) + [tokenizer.bos]", "tokenizer.encode(doc)")],
    [("beta1 ** (step + 1)", "beta1 ** (step + 2)"), ("beta2 ** (step + 1)", "beta2 ** (step + 2)")],
    [("value.grad += slope", "value.grad = slope")],
    [("(other.data, self.data))", "(other.data, 0.0 if self is other else self.data))")],
    [("(1.0 if self.data > 0 else 0.0,)", "(1.0,)")],
    [("        adam(weights, grads,",
      "        total = grads if step == 0 else {name: [[a + b for a, b in zip(x, y)] "
      "for x, y in zip(total[name], rows)] for name, rows in grads.items()}\n        adam(weights, total,")],
]

class Words(dict):
    """The words of MT19937, as the porting section speaks of them."""
    def __getitem__(self, i): return super().__getitem__(i % 624)
    def __setitem__(self, i, word): super().__setitem__(i % 624, word % 2**32)

def outputs(formulas):
    """The outputs of MT19937, seeded with 42, by the formulas of the porting section."""
    state = {"s": Words()}
    begin, fill, mix, mix_back, wrap, end, pair, renew, *temper = [compile(f, f, "exec") for f in formulas]
    exec(begin, state)
    for i in range(1, 624):
        exec(fill, state, {"i": i})
    for k in range(624 + 623):
        exec(mix if k < 624 else mix_back, state, {"i": k % 623 + 1})
        if k % 623 == 622:
            exec(wrap, state)
    exec(end, state)
    while True:
        for i in range(624):
            state["i"] = i
            exec(pair, state)
            exec(renew, state)
        for i in range(624):
            state["y"] = state["s"][i]
            for formula in temper:
                exec(formula, state)
            yield state["y"]

@unittest.skipUnless(os.path.exists(README), "needs README.md beside the tests")
class TestReadme(Test):
    def setUp(self):
        super().setUp()
        for name in ("microgpt.py", "vulkan_gemm.py", "input.txt"):
            shutil.copy(os.path.join(HERE, name), name)
        self.readme, self.source = read(README), read(SCRIPT)

    def section(self, title):
        return self.readme.split(f"\n## {title}\n")[1].split("\n## ")[0]

    def run_command(self, *flags):
        """What a command prints, in lines."""
        status, out, errors = self.script("", *flags, script="microgpt.py")
        lines = (out + errors).replace("\r", "\n").splitlines()
        self.assertEqual(status, "overflowed" in errors, (flags, lines[-1:]))
        return lines

    def edited(self, edits, source):
        for old, new in edits:
            self.assertEqual(source.count(old), 1, old)
            source = source.replace(old, new)
        return source

    def test_every_command_runs(self):
        commands = list(readme_commands())
        self.assertGreater(len(commands), 9)
        for i, (flags, _) in enumerate(commands, 2):
            short = f"--samples=1 --steps={i if '--resume' in flags else 2}".split()
            self.run_command(*flags, *short, *["--warmup-steps=0"] * ("--warmup-steps" in flags))

    def test_the_snippets_name_the_matrices_that_there_are(self):
        text, config = self.section("Taking the weights elsewhere"), Config(27)
        table, first, second = text.split("```python\n")
        for snippet in (first, second):
            compile(snippet.split("```")[0], "README.md", "exec")
        named = set(re.findall(r"[`.]((?:ln|attn|mlp|lm|w[tp])\w+)`", table))
        for shapes in (microgpt.shapes(config), microgpt.gpt2_shapes(config)):
            self.assertLessEqual({name.replace("layer0.", "").split(".")[0] for name in shapes}, named)

    def test_the_numbers_for_porting_are_those_of_the_shipped_names(self):
        lines = self.run_command(*"--explain emma --samples 5 --trace run.jsonl --save run".split())
        for line in self.section("What you see").split("```\n")[1].splitlines():
            self.assertIn(line, lines)
        explained = next(shown for flags, shown in readme_commands() if "--explain" in flags)
        self.assertEqual(explained, lines[-len(explained) :])
        trace, porting = self.trace(), self.section("Porting")
        a, b = Value(2.0), Value(-3.0)
        y = ((a * b + a**2).exp() + 1).log() / b
        microgpt.backward(y)
        step_1, *steps = [trace[step - 1]["loss"] for step in (1, 2, 3, 10, 1000)]
        wanted = [y.data, a.grad, b.grad, step_1, trace[0]["gradient_norm"], *steps]
        weights = microgpt.initial_weights(Config(27), random.Random(42)).items()
        microgpt.mean_loss(Config(27), {n: Matrix.wrap(rows) for n, rows in weights}, trace[0]["tokens"])
        wanted.append(len(microgpt.tape))
        microgpt.tape.clear()
        for flags in ("--batch-size 3", "--arch gpt2"):
            self.run_command(*flags.split(), *"--steps 1 --trace other.jsonl".split())
            wanted.append(self.trace("other.jsonl")[0]["loss"])
        wanted += self.draws(porting)
        text = re.sub("`[^`]*`", "", porting.replace(porting.split("\n\n")[5], ""))
        told = [float(n.replace(",", "")) for n in re.findall(r"-?\d+\.\d{7,}|\d{10}|\d\d,\d{3}", text)]
        self.assertEqual(len(told), len(wanted))
        for i, (number, right) in enumerate(zip(told, wanted)):
            self.assertAlmostEqual(number, right, 10, i)
        samples = [line.split(": ")[1] for line in lines if line.startswith("sample")]
        self.assertIn("{}, {}, {}, {} and {}".format(*samples), porting)
        greedy = re.findall(r"^\| `(--temperature 0.*?)` \| each sample: (\w+)", porting, re.M)
        for more, (flags, name) in zip(("--resume run --steps 0", ""), greedy):
            got = self.run_command(*f"{flags} {more} --samples 1".split())[-1]
            self.assertEqual(got, f"sample  1: {name}")
        self.assertEqual(len(greedy), 2)

    def draws(self, porting):
        """Outputs 1 to 3 after the weights, the first u, outputs 488 to 490, the 245th u."""
        formulas = re.findall(r"`((?:s\[[i0]\]|y) \^?= [^`]+)`", porting)
        out, docs, rng = outputs(formulas), SHIPPED[:], random.Random(42)
        def u(a, b): return ((a >> 5) * 2**26 + (b >> 6)) / 2**53
        for i in range(len(docs) - 1, 0, -1):
            j = i + 1
            while j > i:
                j = next(out) >> 32 - (i + 1).bit_length()
            docs[i], docs[j] = docs[j], docs[i]
        shuffled = SHIPPED[:]
        rng.shuffle(shuffled)
        self.assertEqual(docs, shuffled)
        weights = iter(flat(microgpt.initial_weights(Config(27), rng)))
        for pair in zip(weights, weights):
            u1, u2 = [u(next(out), next(out)) for _ in range(2)]
            radius = 0.08 * math.sqrt(-2 * math.log(1 - u2))
            for wave, right in zip((math.cos, math.sin), pair):
                self.assertAlmostEqual(radius * wave(2 * math.pi * u1), right, 14)
        self.assertIn(f"{rng.getstate()[1][-1]} after the weights", porting)
        after = [next(out) for _ in range(490)]
        self.assertEqual(after, [rng.getrandbits(32) for _ in range(490)])
        return [*after[:3], u(*after[:2]), *after[487:], u(*after[488:])]

    def test_a_mistake_in_a_port_shows_as_it_is_told(self):
        table = re.findall(r"\| (\d) \| (\d+\.\d+) \| [^|]+ (?=\|)", self.section("Porting"))
        self.assertEqual(len(table), len(MISTAKES))
        part_one = self.source[: self.source.index("# PART TWO")]
        right = self.first_losses(part_one, 3)
        for (step, told), edits in zip(table, MISTAKES):
            *before, loss = self.first_losses(self.edited(edits, part_one), int(step))
            self.assertEqual(f"{loss:.{len(told.partition('.')[2])}f}", told, edits)
            self.assertEqual(before, right[: len(before)], edits)

    def first_losses(self, source, n):
        """The first n losses of the default run, by such a part one."""
        port, out = types.ModuleType("port"), []
        with unittest.mock.patch.dict(sys.modules, port=port):  # where dataclasses look for it
            exec(source, vars(port))
        loss_and_grads = port.loss_and_grads

        def recorded(*args):
            if len(out) == n:
                raise StopIteration
            loss, grads = loss_and_grads(*args)
            out.append(loss)
            return loss, grads

        port.loss_and_grads = recorded
        with contextlib.suppress(StopIteration), contextlib.redirect_stdout(io.StringIO()):
            port.train_and_sample("input.txt")
        return out

    def test_the_exercises_fit_the_source(self):
        items = re.findall(r"^\| \d \| .*", self.section("Exercises"), re.M)
        self.assertEqual(len(items), len(EXERCISES))
        for item, (edits, runs) in zip(items, EXERCISES.values()):
            self.file("microgpt.py", self.edited(edits, self.source))
            for _, new in edits:
                self.assertIn(re.split("\n|  #", new)[0], item)
            short = "--steps 2 --val-fraction 0.001 --div-warn 1e9 --samples 1 --batch-size 1"
            self.run_command(*runs[-1].split(), *short.split())

    def check_everything(self):
        """Run every command and every exercise in full, and print what the README does not say."""
        self.timeout, numbers = 1200, " ".join(self.section("Exercises").split())
        for flags, shown in [each for each in readme_commands() if "--help" not in each[0]]:
            lines = list(map(str.rstrip, self.run_command(*flags)))
            other = [f"\n  {line}" for line in shown if line not in lines]
            print("microgpt.py", *flags, "-- OTHER:" if other else "-- as it says", *other)
        for number, (edits, runs) in EXERCISES.items():
            self.file("microgpt.py", self.edited(edits, self.source))
            for run in runs:
                flags = f"--val-fraction 0.1 --eval-every 1000 --samples 5 {run}"
                pattern = r"validation (\d\S+)$|at (step \d+), the" + r"|^sample  \d: (.*)" * (number == 4)
                for line in self.run_command(*flags.split()):
                    for text in filter(None, chain(*re.findall(pattern, line))):
                        print(number, run, text, "-- as it says" if text in numbers else "-- OTHER")

# The benchmark --------------------------------------------------------------------------------------------
# Each row times one thing and another in turn, for some rounds, and gives the medians, also of the ratios. A
# whole process is timed with little to do and with more: the difference is what the rest costs. Below,
# step() and what follows return a function that times something, or two of them.

MEDIUM = "--layers 2 --d-model 64 --context 64"
WINDOWS = f"{MEDIUM} --stream --batch-size 8"

def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

def run(flags):
    """Run the command line on the reference's names if they are there. Returns what it prints."""
    names = NAMES if os.path.exists(NAMES) else os.path.join(HERE, "input.txt")
    return subprocess.check_output([sys.executable, SCRIPT, "--corpus", names, *flags.split()]).decode()

def per(n, work, few, many):
    return lambda: (seconds(lambda: work(many)) - seconds(lambda: work(few))) / n

def step(flags="", n=300):
    return per(n, lambda steps: run(f"--samples 0 {flags} --steps {steps}"), 1, n + 1)

def yardstick():
    command = [sys.executable, YARDSTICK, NAMES]
    return per(20, lambda steps: subprocess.check_output([*command, str(steps), "1000"]), 1, 21)

def token(engine, samples):
    sample = lambda n: re.findall("sample +[0-9]+: (.*)", run(f"--engine {engine} --steps 0 --samples {n}"))
    return per(sum(min(len(name) + 1, 16) for name in sample(samples)), sample, 0, samples)

def merges(learn):
    docs, new = characters([(read(SCRIPT) * 4)[:200_000]])
    return lambda: seconds(lambda: learn(docs[:], 500, new))

def saving():
    folder = tempfile.TemporaryDirectory()
    save = f"{MEDIUM} --samples 0 --steps 21 --save {folder.name}/{{0}} --save-every {{0}}"
    return per(20, lambda every: folder and run(save.format(every)), 1000, 1)

def square(n):
    gpu, a = vulkan_gemm.VulkanGemm(), normal(random.Random(1), n, n)
    return [lambda matmuls=matmuls: min(seconds(lambda: matmuls([a], [a])) for _ in range(3))
            for matmuls in (gpu.matmuls, FastTensor.matmuls)]

BENCHMARKS = [  # what, against what, rounds, and what makes the two functions that time them
    ("a step", "the reference", 5, lambda: (step(), yardstick())),
    ("a step, `--engine scalar`", "the reference", 5, lambda: (step("--engine scalar", 20), yardstick())),
    ("a sampled token", "`--engine scalar`", 5, lambda: (token("tensor", 400), token("scalar", 40))),
    ("a step of 8 windows of 64, 2 layers of 64, `--workers 2`", "one process", 5,
     lambda: [step(f"{WINDOWS} --workers {n}", 2) for n in (2, 1)]),
    ("the same in one process with layers of 128, `--vulkan`", "plain Python", 3,
     lambda: [step(f"{WINDOWS} --d-model 128 --engine {name}", 1) for name in ("vulkan", "tensor")]),
    *[(f"a product of {n} x {n} as by `--vulkan`", "plain Python", 5, lambda n=n: square(n))
      for n in (16, 64, 256)],
    ("500 merges of 200 kB", "a recount for each", 3,
     lambda: [merges(learn) for learn in (microgpt.learn_merges, recount)]),
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
