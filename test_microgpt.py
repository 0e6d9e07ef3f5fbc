#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tests and the benchmark of microgpt, in the order of the file's sections.

    python test_microgpt.py              run all tests
    python test_microgpt.py TestGPT2     run those of one section; -k WORD: those with a word in their name
    python test_microgpt.py readme       run everything that the README shows, as it stands there
    python test_microgpt.py benchmark    print what things cost on this machine

Gradients are held against finite differences, the engines against each other and a computation by hand, and
the command line is run as a person runs it. Two things outside the repository are used if they are there, in
../shared: the reference's names and what it prints on them; the yardstick, which costs what it costs.
"""

import contextlib, ctypes, gc, io, json, math, multiprocessing, os, random, re, runpy, shlex, shutil, signal
import statistics, struct, subprocess, sys, tempfile, threading, time, types, unittest.mock
import unittest, xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from operator import mul

import microgpt
import vulkan_gemm
from microgpt import GPT, GPT2, CharTokenizer, FastTensor, Matrix, Tensor, Value, tape

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "microgpt.py")
README = os.path.join(HERE, "README.md")
NAMES = os.path.join(HERE, "../shared/names.txt")
GOLDEN = os.path.join(HERE, "../shared/golden/default_run.txt")
YARDSTICK = os.path.join(HERE, "../shared/yardstick/reference_cost.py")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ENGINES = Matrix, Tensor, FastTensor
SHIPPED = microgpt.read_documents(os.path.join(HERE, "input.txt"))
LONGER = r"microgpt: note: (\d+ of \d+ documents?|--explain shows) [^\n]*--context[^\n]*\n"  # than the context, and cut there
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

def losses(out):
    """The losses of the steps, as they are printed."""
    return re.findall(r"\| loss (\S+)\r", out)

def limit(name, size):
    """What a new process does so that its files stay below a size, as on a full disk, or their number."""
    def limited():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(getattr(resource, name), (size, size))

    return limited

class Test(unittest.TestCase):
    """A test in a folder of its own, with 60 names in input.txt. It leaves nothing to its neighbors."""
    timeout = 120  # seconds after which a process is killed, which its test notices

    def setUp(self):
        tape.clear()  # of a test that failed
        microgpt.gpu_matmuls.cache_clear()
        for number in STOPS:  # a failing test may leave handlers, the collector, patches
            self.addCleanup(signal.signal, number, signal.getsignal(number))
            if signal.getsignal(number) == signal.SIG_IGN:  # under nohup
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
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
        self.assertEqual(len(tape), 0)

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

    def remove(self, *names):
        for name in filter(os.path.exists, names):
            os.remove(name)

    def trace(self, name="run.jsonl"):
        """The lines of a trace that are of a step: all but the first."""
        return [json.loads(line) for line in self.content(name).splitlines()[1:]]

    def weights(self, name="run"):
        tensors, _ = microgpt.read_safetensors(name)
        return {name: rows for name, rows in tensors.items() if not name.startswith("optimizer.")}

    def metadata(self, name="run"):
        """What a checkpoint says of itself, as objects."""
        _, metadata = microgpt.read_safetensors(name)
        return {key: json.loads(text) for key, text in metadata.items() if key != "format"}

    def main(self, flags="", *more, out=None):
        """Run the command line in this process. Returns its status, standard output and standard error."""
        out, errors = out or io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = microgpt.main([*flags.split(), *more])
        return status, out.getvalue(), errors.getvalue()

    def printed(self, flags="", *more):
        """What a run prints that has nothing to complain of, except that documents are cut."""
        status, out, errors = self.main(flags, *more)
        self.assertEqual((status, re.sub(LONGER, "", errors)), (0, ""), (flags, more))
        return out

    def assertSays(self, status, pattern, flags, *more):
        """The run ends with this status and one line that matches, or none. Returns what it prints."""
        got, out, errors = self.main(flags, *more)
        self.assertEqual((got, errors[:-1].isprintable()), (status, True), errors)
        self.assertRegex(errors, f"^microgpt: {pattern}.*\n$" if pattern else "^$")
        return out

    def assertRefused(self, status, pattern, flags, *more):
        """The run ends with this status and one line that matches, before its first step."""
        self.assertNotIn("step", self.assertSays(status, f"error: .*({pattern})", flags, *more))

    def interrupted(self, flags, step, *numbers):
        """Run until signals (SIGINT if none is named) in a step, which is saved. Returns the output."""
        out, numbers = io.StringIO(), numbers or (signal.SIGINT,)

        def write(text):
            if re.match(rf"step +{step} / +\d+ \| loss \S+$", text):
                for number in numbers:
                    self.assertTrue(callable(signal.getsignal(number)), "a signal would end the tests")
                    signal.raise_signal(number)
            return io.StringIO.write(out, text)

        out.write = write
        status, _, errors = self.main(flags, out=out)
        self.assertEqual(re.sub(LONGER, "", errors), f"microgpt: interrupted; step {step} is saved\n")
        self.assertEqual(status, 128 + numbers[-1])
        return out.getvalue()

    def start(self, flags="", *more, script=SCRIPT, handler=signal.SIG_DFL, env=(), **options):
        """Start a script as a process in a session of its own, its output unbuffered."""
        if hasattr(os, "fork"):
            handle = lambda: [signal.signal(number, handler) for number in STOPS]
            options = {"start_new_session": True, "preexec_fn": handle, **options}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1", **dict(env)}
        env = {name: value for name, value in env.items() if value is not None}
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

    def start_run(self, flags="", until="step +9 ", **options):
        """Start a run that ends only when something ends it, and wait until its output matches."""
        process = self.start(f"--steps 1000000 {flags}", **options)
        self.read_until(process, until)
        return process

    def read_until(self, process, pattern):
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
        step = self.metadata()["step"]
        out = self.printed(f"--resume run --steps {step + 1} --workers 1 --samples 0")
        self.assertEqual(re.findall(r"step +(\d+) / +\d+ \| loss \S+\r", out), [str(step + 1)])
        return step

    def assertSaved(self, process, status, pattern):
        """It ends with one line that matches, and a run goes on from the step that the line says is saved."""
        line = self.assertEnds(process, status, pattern + r" step \d+ is saved")
        self.assertIn(f" step {self.assertGoesOn()} ", line)
        os.remove("run")

# 1. Dataset -----------------------------------------------------------------------------------------------

class TestDataset(Test):
    def test_documents_are_stripped_lines(self):
        path = self.file("a.txt", "\ufeffanna\r\n\r\n  bob b \n\t\n\nzoë\na\x0bb\u2028c\x85d")
        self.assertEqual(microgpt.read_documents(path), ["anna", "bob b", "zoë", "a\x0bb\u2028c\x85d"])

    def test_input_txt_has_names(self):
        self.assertGreaterEqual(len(set(SHIPPED)), 5000)
        self.assertEqual(read(os.path.join(HERE, "input.txt")), "".join(f"{name}\n" for name in SHIPPED))
        self.assertTrue(all(re.fullmatch("[a-z]{2,15}", name) for name in SHIPPED))

# 2. Characters --------------------------------------------------------------------------------------------

class TestCharacters(Test):
    def test_ids_are_sorted_and_bos_is_last_and_any_text_comes_back(self):
        tokenizer = CharTokenizer(["zyxwvutsrqponm", "abcdefghijkl", "emma"])
        self.assertEqual(tokenizer.encode("emma"), [4, 12, 12, 0])
        self.assertEqual((tokenizer.bos, tokenizer.vocab_size), (26, 27))
        for text in ("", "anna", "e\u0301e\u0301", "👩‍👩‍👧 🇫🇷", "שלום עולם", "a\nb\tc \0", "\U0010ffff"):
            tokenizer = CharTokenizer([text, "x"])
            ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.bos]
            self.assertEqual(tokenizer.decode(ids), text)
            with self.assertRaisesRegex(KeyError, "é"):
                tokenizer.encode(text + "é")

# 3. Autograd ----------------------------------------------------------------------------------------------

FUNCTIONS = {name: lambda a, name=name, plain=plain: getattr(a, name)() if isinstance(a, Value) else plain(a)
             for name, plain in (("exp", math.exp), ("log", math.log), ("relu", lambda a: max(0.0, a)))}

class TestAutograd(Test):
    def test_operators_against_finite_differences(self):
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
                    inputs = {*chain(*[node.inputs for node in tape])}
                    self.assertLessEqual(inputs, {a, b, *tape})  # a plain number makes no node
                    out.backward()
                    self.assertAlmostEqual(a.grad, (f(x + h, y) - f(x - h, y)) / (2 * h), 6)
                    self.assertAlmostEqual(b.grad, (f(x, y + h) - f(x, y - h)) / (2 * h), 6)

    def test_example_of_the_section_and_how_values_are_shown(self):
        a, b = Value(2.0), Value(3.0)
        c = a * b + a
        c.backward()
        self.assertEqual((c.data, a.grad, b.grad), (8.0, 4.0, 2.0))
        (a * b).backward()  # gradients add up
        self.assertEqual((repr(a), repr(Value(-4 / 3))), ("Value(2, grad=7)", "Value(-1.333, grad=0)"))
        self.assertEqual(b.grad, 4.0)
        x = a = Value(1.0)
        for _ in range(20_000):  # no graph is too deep
            x = x * 1.00001 + 0.0
        x.backward()
        self.assertAlmostEqual(a.grad, 1.00001**20_000, 6)

    def test_a_loss_no_longer_on_the_tape_is_refused(self):
        a = Value(2.0)
        first, second = a * 3, a * a
        first.backward()
        for lost in (first, second, a):  # a was never there, as nothing computed it
            with self.assertRaises(RuntimeError):
                lost.backward()
        self.assertEqual(a.grad, 3.0)
        (a * 3 + a * a).backward()  # this is how to use both
        self.assertEqual(a.grad, 3.0 + 7.0)

# 4. The operations ----------------------------------------------------------------------------------------

def operations(rng):
    """Name -> (operation, its inputs) on random shapes, down to one row and one channel."""
    t, d, e = (rng.choice([1, 2, 3, 6, 9]) for _ in range(3))
    x, z, w, back = normal(rng, t, d), normal(rng, t, d), normal(rng, e, d), normal(rng, 3, e)
    ids = [rng.randrange(e) for _ in range(t)]
    n_head, size = rng.randint(1, 3), rng.randint(1, 4)
    lengths = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    positions = [position for n in lengths for position in range(n)]
    return {
        "embed": (lambda table: table.embed(ids), [w]), "add": (lambda x, z: x + z + x.rmsnorm(), [x, z]),
        "linear": (lambda x, w: x.linear(w), [x, w]), "linear by itself": (lambda x: x.linear(x), [x]),
        "rmsnorm": (lambda x: x.rmsnorm(), [[[0.0] * d, *x]]), "cross entropy": (lambda x: x, [x]),
        "relu of a relu": (lambda x, w: (x.linear(w).relu() + x.linear(w)).relu(), [x, w]),
        "mlp": (lambda x, w, back: x.linear(w).relu().linear(back), [x, w, back]),
        "relus": (lambda x, w, back: x.relu().linear(w.relu()).relu().linear(back).relu(), [x, w, back]),
        "attention": (lambda q, k, v: q.attention(k, v, n_head, positions, []),
                      [normal(rng, sum(lengths), n_head * size) for _ in "qkv"]),
        "results and inputs that are not used": (lambda x, z: (x + z, z.rmsnorm(), x.relu())[2], [x, z, w]),
    }

def gradients(engine, f, inputs):
    """The numbers of f's result, a loss that depends on all of it, and the gradients of the inputs."""
    tape.clear()
    inputs = list(map(engine.wrap, inputs))
    out = f(*inputs[: f.__code__.co_argcount])
    head = engine.wrap(normal(random.Random(1), 3, len(out.data[0])))
    loss = out.linear(head).cross_entropy([t % 3 for t in range(len(out.data))])
    out.relu()  # which stands behind the loss on the tape
    loss.backward()
    return out.data, loss.data, [matrix.grad for matrix in inputs]

def slope(f, row, j, h=1e-6):
    """The derivative of f(), which reads row, by row[j]."""
    before, results = row[j], []
    for row[j] in (before + h, before - h):
        results.append(f())
    row[j] = before
    return (results[0] - results[1]) / (2 * h)

def softmax(scores, temperature=1):
    exps = [math.exp((a - max(scores)) / temperature) for a in scores]
    return [e / sum(exps) for e in exps]

class TestOperations(Test):
    def assertRounded(self, values, wanted):
        tape.clear()
        self.assertEqual([round(a.data, 2) for a in values], wanted)

    def test_every_operation_against_finite_differences_and_in_each_engine(self):
        for seed, (name, (f, inputs)) in [(seed, item) for seed in range(16)
                                          for item in operations(random.Random(seed)).items()]:
            before, rng = json.dumps(inputs), random.Random(seed)
            out, loss, grads = gradients(Matrix, f, inputs)
            with self.subTest(name, seed=seed):
                for rows, grad in zip(inputs, grads):
                    i, j = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
                    wanted = slope(lambda: gradients(Matrix, f, inputs)[1], rows[i], j)
                    self.assertAlmostEqual(grad[i][j], wanted, delta=1e-6 * max(1, abs(wanted)))
                for engine in (Tensor, FastTensor):  # of sections 9 and 10
                    got, got_loss, got_grads = gradients(engine, f, inputs)
                    for a, b in zip([got, [[got_loss]], *got_grads], [out, [[loss]], *grads]):
                        self.assertClose(a, b)
                self.assertEqual(json.dumps(inputs), before)

    def test_examples_of_the_section(self):
        numbers = lambda *row: list(map(Value, row))
        self.assertRounded(microgpt.softmax(numbers(2, 1, 0)), [0.67, 0.24, 0.09])
        self.assertRounded(microgpt.rmsnorm(numbers(3, 4)), [0.85, 1.13])
        self.assertRounded([microgpt.dot(numbers(1, 2, 3), numbers(4, 5, 6))], [32])
        keys = [numbers(*key) for key in ([0, 1, 0, 0], [1, 0, 2, 0], [0, 1, 1, 1])]
        self.assertRounded(microgpt.attend(numbers(2, 0, 1, 1), keys, [*map(numbers, (5, 1, 0))]), [1.12])
        self.assertRounded(Matrix.wrap([[1, 2]]).linear(Matrix.wrap([[3, 4], [5, 6]])).rows[0], [11, 17])
        self.assertRounded([Matrix.wrap([[0.0] * 27]).cross_entropy([5])], [3.3])

    def test_large_scores_do_not_overflow_and_relu_at_0_passes_nothing(self):
        for engine in ENGINES:
            for row, wanted, grad in (([-1e4, 1e4, 0.0], 2e4, [-1.0, 1.0, 0.0]),
                                      ([1e4, 1e4, 1e4], math.log(3), [-2 / 3, 1 / 3, 1 / 3])):
                x = engine.wrap([row])
                loss = x.cross_entropy([0])
                self.assertAlmostEqual(loss.data, wanted, 9)
                loss.backward()
                self.assertClose(x.grad, [grad])
            for keys, wanted in (([[1e4], [1e4]], [[1.0], [1.5]]), ([[1e4], [-1e4]], [[1.0], [1.0]])):
                q, k, v = map(engine.wrap, ([[1.0], [1.0]], keys, [[1.0], [2.0]]))
                self.assertClose(q.attention(k, v, 1, [0, 1], []).data, wanted)
                tape.clear()
            out, _, (grad,) = gradients(engine, lambda x: x.relu(), [[[0.0, -0.0, 1.0, -1.0]]])
            self.assertEqual(out, [[0.0, 0.0, 1.0, 0.0]])
            self.assertEqual([a != 0 for a in grad[0]], [False, False, True, False])

# 5. GPT ---------------------------------------------------------------------------------------------------

DOCS = [[1, 2, 3, 4], [5, 6], [7, 1, 1, 2, 9, 10]]

def small(kind=GPT, n_layer=2, n_embd=8, n_head=2, block_size=8, vocab_size=11):
    """A small model with weights large enough to matter, all of them."""
    model = kind(vocab_size, n_layer, n_embd, n_head, block_size)
    return model, {name: normal(random.Random(name), *shape) for name, shape in model.shapes().items()}

def logits(engine, model, weights, *calls):
    """The logits of some rows, handed over in calls, each a list of (id, position)."""
    w = {name: engine.wrap(rows) for name, rows in weights.items()}
    cache, out = model.new_cache(), []
    for call in calls:
        ids, positions = zip(*call)
        out += model.logits(w, list(ids), list(positions), cache).data
        tape.clear()
    return out

def placed(*docs):
    """The (id, position) of documents that follow one another."""
    return [(i, position) for doc in docs for position, i in enumerate(doc)]

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

def loss_by_hand(weights, doc, n_head=4):
    """-log(p) of each token of a document but the first."""
    rows = by_hand(weights, doc[:-1], n_head)[0]
    return [-math.log(softmax(row)[target]) for row, target in zip(rows, doc[1:])]

class Models:
    """The tests of a model, for each of the two."""
    def test_logits_against_a_computation_by_hand(self):
        tokens = [1, 2, 3, 3, 10, 0, 7, 2]
        for engine in ENGINES:
            model, weights = small(self.kind)
            rows = placed(tokens)
            whole = logits(engine, model, weights, rows)
            self.assertClose(whole, by_hand(weights, tokens, 2)[0])
            for calls in [[row] for row in rows], (rows[:3], rows[3:4], rows[4:]):
                self.assertClose(logits(engine, model, weights, *calls), whole, 1e-12)

    def test_documents_in_one_call_are_each_alone(self):
        model, weights = small(self.kind)
        a, b, c, d = [1, 2, 3], [4, 4, 4, 4, 4, 4, 4, 4], [5], [6, 0, 1, 2]
        wanted = [row for doc in (a, b, c, d) for row in by_hand(weights, doc, 2)[0]]
        rows = placed(a, b, c, d)
        for engine in ENGINES:
            self.assertClose(logits(engine, model, weights, rows), wanted)
            self.assertClose(logits(engine, model, weights, rows[:6], rows[6:10], rows[10:]), wanted)
        single = [logits(Tensor, model, weights, placed(doc)) for doc in (a, b, c, d)]
        self.assertClose(list(chain(*single)), wanted)

    def test_an_interrupted_call_leaves_nothing_to_the_next(self):
        model, weights = small(self.kind)
        for engine in (Matrix, FastTensor):
            compute = lambda: microgpt.loss_and_grads(model, weights, DOCS[:1], engine)
            wanted = compute()
            for name in ("rmsnorm", "cross_entropy", "attention"):
                with unittest.mock.patch.object(engine, name, side_effect=KeyboardInterrupt), \
                     self.assertRaises(KeyboardInterrupt):
                    compute()
                self.assertEqual(compute(), wanted)
            w = {name: engine.wrap(rows) for name, rows in weights.items()}
            model.logits(w, [0], [0], model.new_cache())  # whose loss nobody asks for
            self.assertEqual(compute(), wanted)

    def test_gradients_against_finite_differences(self):
        (model, weights), rng = small(self.kind), random.Random(2)
        compute = lambda engine: microgpt.loss_and_grads(model, weights, DOCS, engine)
        loss, wanted = compute(Matrix)
        logs = [a for doc in DOCS for a in loss_by_hand(weights, doc, 2)]
        self.assertAlmostEqual(loss, statistics.mean(logs), 10)
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

class TestGPT(Models, Test):
    kind = GPT

    def test_heads_must_divide_the_channels(self):
        self.assertEqual(GPT(27, n_embd=6, n_head=3), GPT(27, 1, 6, 3, 16))
        with self.assertRaisesRegex(ValueError, "4 heads"):
            GPT(27, n_embd=6)

# 6. Adam --------------------------------------------------------------------------------------------------

def adam_by_formula(w, g, m, v, t, lr, beta1=0.85, beta2=0.99, eps=1e-8):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return w - lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps), m, v

class Optimizing(Test):
    def assertMoves(self, optimizer, formula, **settings):
        """Five steps of an optimizer move weights, m, and v by the formula, for each number."""
        rng = random.Random(4)
        weights = {"a": normal(rng, 2, 3), "b": normal(rng, 1, 2)}
        m, v = microgpt.zeros(weights), microgpt.zeros(weights)
        wanted = [(w, 0.0, 0.0) for w in flat(weights)]
        for t in range(1, 6):
            lr, grads = 0.1 / t, {"a": normal(rng, 2, 3), "b": [[0.0, 1e-7]]}
            before = repr(grads)
            optimizer(weights, grads, m, v, t - 1, lr, **settings)
            self.assertEqual(repr(grads), before)
            wanted = [formula(w, g, mi, vi, t, lr, **settings) for g, (w, mi, vi) in zip(flat(grads), wanted)]
            for got, numbers in zip((weights, m, v), zip(*wanted)):
                self.assertClose([flat(got)], [numbers], 1e-12)

class TestAdam(Optimizing):
    def test_steps_against_the_formula(self):
        for settings in {}, {"beta1": 0.9, "beta2": 0.8, "eps": 0.1}:
            self.assertMoves(microgpt.adam, adam_by_formula, **settings)

    def test_examples_of_the_section(self):
        for sign, size, least, most in (1, 5, 0.999, 1.001), (1, 0.01, 0.999, 1.001), (-1, 5, 0.07, 0.09):
            weights, m, v, g = {"w": [[0.0]]}, {"w": [[0.0]]}, {"w": [[0.0]]}, size
            for step in range(200):
                before = weights["w"][0][0]
                microgpt.adam(weights, {"w": [[g]]}, m, v, step, 0.01)
                moved = abs(weights["w"][0][0] - before) / 0.01
                g *= sign
            self.assertTrue(least < moved < most, (sign, size, moved))

# 7. Training and sampling ---------------------------------------------------------------------------------

class TestSampling(Test):
    def test_each_draw_goes_by_the_whole_text_until_bos_or_the_context_ends_it(self):
        (model, weights), rng, lengths = small(vocab_size=5), random.Random(3), set()
        for temperature in (0.5, 1.0, 7.0, 1e9) * 3:
            with unittest.mock.patch.object(rng, "choices", wraps=rng.choices) as choices:
                ids = microgpt.sample(model, weights, 4, temperature, rng)
            odds = [call[1]["weights"] for call in choices.call_args_list]
            rows = by_hand(weights, [4, *ids][:8], 2)[0]
            self.assertEqual((len(odds), tape, 4 in ids), (min(len(ids) + 1, 8), [], False))
            self.assertClose(odds, [softmax(row, temperature) for row in rows])
            lengths.add(len(ids))
        self.assertEqual((min(lengths), max(lengths)), (0, 8))

# 8. Putting it together -----------------------------------------------------------------------------------

class TestPartOne(Test):
    def test_it_runs_by_itself_as_the_command_line_does(self):
        part_one, _ = read(SCRIPT).split("# PART TWO")
        self.file("long.txt", "ab" * 12 + "\nb\ncab\n")  # longer than the context, and fewer than the steps
        calls = "train_and_sample(steps=5)\ntrain_and_sample('long.txt', 7)\n"
        wanted = self.printed("--steps 5") + self.printed("--steps 7 --corpus long.txt --engine scalar")
        self.assertEqual(self.script(script=self.file("part_one.py", part_one + calls)), (0, wanted, ""))

# 9. The same operations, a matrix at a time ---------------------------------------------------------------

class TestTensor(Test):
    def test_a_loss_no_longer_on_the_tape_is_refused(self):
        x = Tensor([[1.0, 2.0]])
        first, second = x.cross_entropy([0]), x.cross_entropy([1])
        first.backward()
        self.assertClose(x.grad, [[softmax([1, 2])[0] - 1, softmax([1, 2])[1]]])
        for lost in (first, second):
            with self.assertRaises(RuntimeError):
                lost.backward()

# 10. Faster products --------------------------------------------------------------------------------------

class TestProducts(Test):
    def test_all_lengths_and_mostly_zeros(self):
        rng, lengths = random.Random(8), (1, 2, 3, 15, 16, 17, 63, 64, 65, 66, 128, 257)

        def matrix(length, density):
            rows = normal(rng, rng.choice([1, 2, 5, 9]), length) + [[0.0] * length] * (density < 1)
            kind = list if density == 1 else microgpt.Sparse
            return kind([[a * (rng.random() < density) for a in row] for row in rows])

        for length, *densities in product(lengths, (1, 0.5, 0.2, 0), (1, 0.5, 0.2, 0)):
            rows, columns = (matrix(length, density) for density in densities)
            wanted = [[math.fsum(map(mul, row, column)) for column in columns] for row in rows]
            with self.subTest(length=length, densities=densities):
                for engine in (Tensor, FastTensor):
                    self.assertClose(engine.matmul(rows, columns), wanted, 1e-12)

# 11. Subwords ---------------------------------------------------------------------------------------------

def characters(docs):
    """Documents as strings of chr(id), and the number of ids."""
    tokenizer = CharTokenizer(docs)
    return ["".join(map(chr, tokenizer.encode(doc))) for doc in docs], len(tokenizer.tokens)

def merged(ids, merges, first):
    """Some ids after merges, one after the other, each from left to right."""
    for new, pair in enumerate(merges, first):
        out = []
        for i in ids:
            if out and (out[-1], i) == pair:
                out[-1] = new
            else:
                out.append(i)
        ids = out
    return ids

class TestSubwords(Test):
    def cases(self):
        """Numbers of merges and documents, random and awkward."""
        yield from [(9, ["banana"]), (9, ["a" * 31]), (9, ["aaaabaaab", "aaa", "aabaa"]), (90, SHIPPED[:300]),
                    (80, [read(SCRIPT)[:5000]]), (20, ["abab" * 9, "ba"]), (5, ["", "a", ""]), (0, ["abab"]),
                    (9, ["é😀é😀", "😀é😀é"]), (9, ["ab", "ab", "b", "a"]), (9, ["xaaax", "aaaa", "aaaaa"])]
        for seed in range(190):
            rng = random.Random(seed)
            letters, docs = "abcde"[: rng.randint(1, 5)], range(rng.randint(1, 4))
            docs = ["".join(rng.choices(letters, k=rng.randint(0, 50))) for _ in docs]
            yield rng.randint(0, 25), [*docs, "x"]

    def test_both_ways_to_learn_merges_take_the_most_frequent_pair_and_encoding_makes_them(self):
        for n, docs in self.cases():
            with self.subTest(n=n, docs=docs[:3]):
                strings, first = characters(docs)
                merges, ids = microgpt.learn_merges(strings, n, first), [[*map(ord, doc)] for doc in strings]
                self.assertEqual(microgpt.learn_merges_slowly(strings, n, first), merges)
                for i in range(min(n, len(merges) + 1)):
                    counts = Counter(pair for doc in ids for pair in zip(doc, doc[1:]))
                    best = sorted(counts, key=lambda pair: (-counts[pair], pair))[:1]  # the smaller on a tie
                    self.assertEqual(merges[i : i + 1], [pair for pair in best if counts[pair] > 1])
                    ids = [merged(doc, merges[i : i + 1], first + i) for doc in ids]
                tokenizer = microgpt.BPETokenizer(docs, merges)
                self.assertEqual((tokenizer.bos, tokenizer.vocab_size - 1), (first + len(merges),) * 2)
                self.assertEqual(list(map(tokenizer.encode, docs)), ids)
                self.assertEqual([list(map(ord, doc)) for doc in tokenizer.merge(docs)], ids)
                self.assertEqual([tokenizer.decode([tokenizer.bos, *each]) for each in ids], docs)

    def test_the_example_of_the_section_and_an_unknown_character(self):
        strings, first = characters(["banana"])
        self.assertEqual((microgpt.learn_merges(strings, 9, first), first), ([(0, 2)], 3))  # a n
        self.assertEqual(microgpt.BPETokenizer(["banana"], [(0, 2)]).encode("banana"), [1, 3, 3, 0])
        with self.assertRaisesRegex(microgpt.UserError, "'é'.*U\\+00E9"):
            microgpt.BPETokenizer(["ab"], [(0, 1)]).encode("abé")

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
    @unittest.skipUnless(shutil.which("spirv-val"), "needs spirv-tools")
    def test_the_shader_is_valid_and_unrolls_to_one_loop_and_registers_alone(self):
        shipped = self.file("gemm.spv", vulkan_gemm.load_shader())
        subprocess.check_call(["spirv-val", shipped])
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
        alone = self.script("--vulkan", script=shutil.copy(SCRIPT, "alone.py"), env={"PYTHONPATH": ""})
        line = "error: cannot use a GPU (--engine tensor needs none): No module named 'vulkan_gemm'"
        self.assertEqual(alone[::2], (1, f"microgpt: {line}; nothing was saved\n"))

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
        def failing(function, *arguments):
            setattr(gpu.vk, name, function)
            if after:
                function(*arguments)
            raise error

        self.replace(gpu, name, failing)

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

STARTING = """
import multiprocessing
method, n, number = sys.argv[1], *map(int, sys.argv[2:4])
real = multiprocessing.get_context
multiprocessing.get_context = lambda name=None: real(method)
start, started = real(method).Process.start, []

def start_and_signal(process):
    start(process)
    started.append(process)
    if len(started) == n and method == "fork":
        os.killpg(0, number)

if __name__ == "__main__":
    real(method).Process.start = start_and_signal
    sys.exit(microgpt.main(sys.argv[4:]))
elif multiprocessing.current_process().name.endswith(f"-{n}"):  # only starting
    os.killpg(0, number)
"""

def gone(pid):
    """Whether a process is not there, or dead and only waiting to be forgotten."""
    try:
        return read(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True

class TestWorkers(Test):
    def workers(self, n, engine=FastTensor):
        """Workers, and their processes."""
        before, workers = {*multiprocessing.active_children()}, microgpt.Workers(n, engine)
        self.addCleanup(workers.stop)
        return workers, [each for each in multiprocessing.active_children() if each not in before]

    def test_they_compute_what_one_process_does(self):
        (model, weights), batch = small(), [*DOCS, [9, 9], *DOCS]
        for engine in Matrix, FastTensor:
            (loss, wanted), results = microgpt.loss_and_grads(model, weights, batch, engine), set()
            for n in (1, 2, 4, 2):
                workers, processes = self.workers(n, engine)
                self.assertEqual(len(processes), n - 1)  # and this one
                got = [workers.loss_and_grads(model, weights, batch) for _ in "ab"]
                results |= {(n, repr(each)) for each in got}
                self.assertAlmostEqual(got[0][0], loss, 12)
                for name in weights:
                    self.assertClose(got[0][1][name], wanted[name])
                workers.stop()
                self.assertFalse(any(process.is_alive() for process in processes))
            self.assertEqual(len(results), 3)  # as many workers, the same bytes

    def test_a_run_prints_the_same_however_its_workers_start(self):
        flags = "--steps 3 --batch-size 3 --stream --context 8 --arch gpt2 --samples 1"
        wanted, script = self.printed(flags), self.driver(STARTING)
        self.assertEqual(self.printed(f"{flags} --workers 2"), wanted)
        for method in {*multiprocessing.get_all_start_methods()} - {"fork"}:  # as on macOS and Windows
            got = self.script(f"{method} 0 0 {flags} --workers 2", script=script)
            self.assertEqual(got, (0, wanted, ""))

    @needs_posix
    def test_signals_to_the_group_while_workers_start_are_one_line(self):
        script, flags = self.driver(STARTING), "--steps 100000 --workers 3 --batch-size 3 --samples 0"
        for method, n, name in (("fork", 1, "SIGINT"), ("fork", 2, "SIGHUP"),
                                ("spawn", 1, "SIGINT"), ("spawn", 2, "SIGTERM")):
            number = int(getattr(signal, name))
            status, _, errors = self.script(f"{method} {n} {number} {flags}", script=script)
            self.assertEqual((status, errors), (128 + number, "microgpt: interrupted; nothing was saved\n"))

    @needs_posix
    def test_descriptors_used_up_are_one_line(self):
        for n in (9, 12):
            flags, limited = "--steps 5 --batch-size 8 --workers 8 --save run", limit("RLIMIT_NOFILE", n)
            line = "microgpt: error: cannot start the workers: Too many open files; nothing was saved\n"
            self.assertEqual(self.script(flags, preexec_fn=limited)[::2], (1, line))

    def test_an_error_in_a_worker_is_passed_on(self):
        (model, weights), (workers, _) = small(), self.workers(2)
        with self.assertRaises(IndexError):
            workers.loss_and_grads(model, weights, [[0, 1], [99, 1]])
        for more in ("", "--workers 2"):
            self.assertSays(1, "error: .*overflowed", f"--batch-size 2 --lr 1e300 --samples 0 {more}")

    def test_a_dead_worker_is_an_error_and_only_workers_are_stopped(self):
        other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
        other.start()
        self.addCleanup(other.join)
        self.addCleanup(other.kill)
        (model, weights), (workers, processes) = small(), self.workers(3)
        workers.loss_and_grads(model, weights, DOCS)
        processes[1].kill()
        with self.assertRaisesRegex(microgpt.UserError, "a worker has died"):
            for _ in range(99):  # it dies soon
                workers.loss_and_grads(model, weights, DOCS)
        workers.stop()
        self.assertEqual([process.is_alive() for process in (other, *processes)], [True, False, False])

@unittest.skipUnless(os.path.exists("/proc/thread-self/children"), "needs processes in /proc")
class TestWorkersOfARun(Test):
    def start_workers(self, flags="", until="step +9 "):
        """A long run of three processes, and the two that are workers."""
        process = self.start_run(f"--batch-size 4 --workers 3 --save run {flags}", until)
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

    def test_a_killed_worker_is_one_line_and_the_work_is_saved(self):
        for flags in "", "--val-fraction 0.5 --eval-every 1 --div-warn 1e9":  # mostly outside of the workers
            process, workers = self.start_workers(flags)
            os.kill(workers[1], signal.SIGKILL)
            self.assertSaved(process, 1, "error: a worker has died;")
            self.assertGone(workers)

    def test_signals_to_the_group_leave_workers_alone(self):
        for number in STOPS:
            process, workers = self.start_workers()
            os.killpg(process.pid, number)
            self.assertSaved(process, 128 + number, "interrupted;")
            self.assertGone(workers)

    def test_a_killed_parent_takes_its_workers_along(self):
        self.timeout = 60
        for flags, until in (
            ("", "step +9 "),
            ("--batch-size 20000", "params"),  # all are busy, for half a minute
            ("--gen-every 1 --max-tokens 1000000 --temperature 9", "step +1 "),  # all rest: a sample grows
        ):
            process, workers = self.start_workers(flags, until)
            process.kill()
            process.wait()
            self.assertGone(workers)

# 14. GPT-2 as published -----------------------------------------------------------------------------------

class TestGPT2(Models, Test):
    kind = GPT2

    def test_its_first_weights_are_as_published(self):
        weights = GPT2(27, n_layer=2, n_embd=64).initial_weights(random.Random(1))
        self.assertNotIn("lm_head", weights)  # that is wte
        names = ["attn_wq", "attn_wk", "attn_wv", "attn_wo", "mlp_fc1", "mlp_fc2", "ln1", "ln2"]
        names = ["wte", "wpe", "ln_f", *[f"layer{i}.{name}" for i in (0, 1) for name in names]]
        biases = [f"{name}.bias" for name in names if name not in ("wte", "wpe")]
        self.assertEqual(set(weights), {*names, *biases})
        self.assertEqual(len(weights["layer1.mlp_fc1.bias"][0]), 4 * 64)
        for name, rows in weights.items():
            if name in biases or "ln" in name:
                self.assertEqual(set(flat(rows)), {0.0 if name in biases else 1.0}, name)
            else:
                deviation = math.sqrt(statistics.mean(a * a for a in flat(rows)))
                wanted = 0.01 if name.endswith(("attn_wo", "mlp_fc2")) else 0.02
                self.assertAlmostEqual(deviation, wanted, delta=0.001, msg=name)

# 15. Optimizers in historical order -----------------------------------------------------------------------

class TestOptimizers(Optimizing):
    def test_steps_of_each_against_its_formula(self):
        def sgd(w, g, m, v, t, lr):
            return w - lr * g, m, v
        def momentum(w, g, m, v, t, lr, beta1=0.85):
            m = beta1 * m + g
            return w - lr * m, m, v
        def rmsprop(w, g, m, v, t, lr, beta2=0.99, eps=1e-8):
            v = beta2 * v + (1 - beta2) * g * g
            return w - lr * g / (math.sqrt(v) + eps), m, v
        def adamw(w, g, m, v, t, lr, weight_decay=0.01, **settings):
            return adam_by_formula(w - lr * weight_decay * w, g, m, v, t, lr, **settings)

        settings = {"beta1": 0.9, "beta2": 0.8, "eps": 0.1, "weight_decay": 0.5}
        for name, formula, taken in (("sgd", sgd, ""), ("momentum", momentum, "beta1"),
                                     ("rmsprop", rmsprop, "beta2 eps"),
                                     ("adam", adam_by_formula, "beta1 beta2 eps"),
                                     ("adamw", adamw, "beta1 beta2 eps weight_decay")):
            with self.subTest(name):
                self.assertMoves(microgpt.OPTIMIZERS[name], formula)
                new = {name: settings[name] for name in taken.split()}
                self.assertMoves(microgpt.OPTIMIZERS[name], formula, **new)

    def test_clipping_goes_by_the_norm_of_all_gradients(self):
        for limit in (0, 0.5, 100):  # the norm is about 2
            flags = f"--optimizer sgd --lr 1 --clip-grad {limit} --samples 0 --trace run.jsonl"
            self.printed(f"{flags} --steps 0 --save start{limit}")
            self.printed(f"{flags} --steps 1 --save end{limit}")
            before, after = self.weights(f"start{limit}"), self.weights(f"end{limit}")
            grads = self.trace()[0]["gradients"]  # before they are clipped
            scale = min(1, (limit or math.inf) / math.sqrt(sum(g * g for g in flat(grads))))
            moved = [a - b for a, b in zip(flat(before), flat(after))]
            self.assertClose([moved], [[g * scale for g in flat(grads)]])

    def test_schedules_at_their_corners(self):
        def rates(name, warmup, steps):
            flags = f"--schedule {name} --warmup-steps {warmup} --steps {steps} --lr 0.5 --optimizer sgd"
            self.printed(f"{flags} --clip-grad 0.1 --samples 0 --d-model 4 --context 2 --trace run.jsonl")
            return [line["learning_rate"] for line in self.trace()]

        half = lambda share: 0.25 * (1 + math.cos(math.pi * share))
        for name, ends in (("linear", [0.25, 0.375, 0.005]), ("cosine", [half(0.5), half(0.25), half(0.99)]),
                           ("constant", [0.5] * 3)):
            got = [rates(name, 10, 110)[step] for step in (0, 9, 10, 60, 35, 109)]
            got += [rates(name, 0, 1)[0], rates(name, 100, 100)[99]]
            self.assertClose([got], [[0.05, 0.5, 0.5, *ends, 0.5, 0.5]], 1e-12)

# 16. Sampling ---------------------------------------------------------------------------------------------

class TestGenerate(Test):
    def drawn(self, row, temperature, top_k, n=4000):
        """How often each id was drawn."""
        rng = random.Random(1)
        counts = Counter(microgpt.draw(row, temperature, top_k, rng) for _ in range(n))
        return [counts[i] for i in range(len(row))]

    def test_tokens_come_as_often_as_temperature_says(self):
        for temperature, k in product((0.5, 1.0, 2.0), (0, 3, 4, 99)):
            odds = softmax([0.0, 1.0, -2.0 if k != 3 else -1e9, 0.5], temperature)
            for count, p in zip(self.drawn([0.0, 1.0, -2.0, 0.5], temperature, k), odds):
                self.assertLessEqual(abs(count / 4000 - p), 4 * math.sqrt(p * (1 - p) / 4000))

    def test_top_k_draws_from_k_even_among_equals_and_the_coldest_take_the_likeliest(self):
        for row, k, kept in (([1, 2, 1, 0], 1, {1}), ([1, 2, 1, 0], 2, {1}), ([1, 2, 1, 0], 3, {0, 1, 2}),
                             ([5, 5, 5, 6], 1, {3}), ([5] * 4, 1, set()), ([5] * 4, 3, set())):
            drawn = {i for i, count in enumerate(self.drawn(row, 3.0, k, 300)) if count}
            self.assertEqual((len(drawn), kept - drawn), (k, set()))
        self.assertEqual(self.drawn([0.0, 3.0, 2.9, 3.0], 0, 0, 20), [0, 20, 0, 0])
        self.assertEqual(self.drawn([1e299, -1e299, 0.0], 1e-300, 0, 20), [20, 0, 0])
        for broken in math.nan, math.inf, -math.inf:
            with self.assertRaisesRegex(ArithmeticError, "overflowed"):
                microgpt.draw([0.0, broken], 0, 0, random.Random(1))

    def test_the_window_slides_and_a_stream_begins_as_after_a_line(self):
        self.file("text.txt", "abcabd\taecb\n" * 9)
        chars = sorted("\t\nabcde")
        for size in (1, 5, 6):
            flags = f"--corpus text.txt --stream --context {size} --steps 30 --lr 0.3 --temperature 0"
            self.printed(f"{flags} --samples 0 --save run{size}")
            for prompt in ("", "ab", "abcabdaecbd", "\n\nab"):
                typed = prompt.replace("\n", "\\n")
                out = self.printed(f"--resume run{size} --max-tokens 12 --samples 1 --prompt={typed}")
                past, start = [chars.index(char) for char in prompt or "\n"], 0  # where the window begins
                for _ in range(12):
                    if len(past) - start > size:
                        start = len(past) - (size + 1) // 2
                    row = by_hand(self.weights(f"run{size}"), past[start:], 4)[0][-1]
                    past.append(row.index(max(row)))
                text = prompt + "".join(chars[i] for i in past[-12:])
                title = "\n--- inference (new, hallucinated text) ---"
                self.assertEqual(out[out.index("\n---") :], f"{title}\nsample  1: {text}\n")

# 17. Checkpoints ------------------------------------------------------------------------------------------

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
        self.remove("run")
        self.printed(f"--steps 3 --samples 0 --save run {flags}")
        return self.content("run")

    def test_a_run_in_parts_and_from_other_folders_is_the_run_without_a_break(self):
        always = "--steps 24 --d-model 8 --context 8 --samples 3 --div-warn 1e9 --seed 5"
        files = lambda name, up=".": f"--trace {up}/{name}.jsonl --plot {up}/{name}.svg"
        shown, home = lambda out: re.findall(r"(?:step|sample)[^\r\n]*", out), os.getcwd()
        os.makedirs("some/folder")
        for flags in (
            "--optimizer momentum --cosine --warmup-steps 7 --batch-size 3 --clip-grad 1 --gen-every 9",
            "--optimizer rmsprop --stream --val-fraction 0.2 --eval-every 8 --gen-every 8",
            "--arch gpt2 --val-fraction 0.1 --eval-every 7 --vocab-size 20 --corpus input.tx?",
            "--optimizer adamw --weight-decay 0.1 --stream --vocab-size 30 --batch-size 2",
        ):
            with self.subTest(flags):
                whole = self.printed(f"{flags} {always} {files('whole')} --save whole")
                parts = [self.interrupted(f"{flags} {always} {files('part')} --save part", 5)]
                for step, folder, more in ((6, "some/folder", "--seed 5"), (13, "some", ""), (24, ".", "")):
                    os.chdir(os.path.join(home, folder))
                    up = os.path.relpath(home)
                    resume = f"--resume {up}/part {files('part', up)} {more}"
                    parts.append(self.interrupted(resume, step) if step < 24 else self.printed(resume))
                self.assertEqual([line for part in parts for line in shown(part)], shown(whole))
                self.printed("--resume whole --samples 0 --plot again.svg")
                self.assertEqual(self.content("again.svg"), self.content("whole.svg"))
                for end in ("", ".jsonl", ".svg"):
                    self.assertTrue(self.content(f"part{end}") == self.content(f"whole{end}"), end)
                self.remove("part", "whole")

    def test_a_checkpoint_of_an_earlier_version_goes_on_with_one_note(self):
        old = "--steps=8 --schedule=cosine --samples=2 --d-model=8 --heads=2 --context=12 --vocab-size=5"
        whole = self.printed(f"{old} --save whole")
        self.interrupted(f"{old} --save run", 5)
        tensors, metadata = microgpt.read_safetensors("run")
        for name in ("corpus", "losses", "validations"):
            del metadata[name]
        microgpt.write_safetensors("run", tensors, {**metadata, "flags": json.dumps(old.split())})
        out = self.assertSays(0, "note: .*unknown", "--resume run")
        self.assertEqual(out[-99:], whole[-99:])
        self.assertEqual(self.weights("run"), self.weights("whole"))
        self.printed("--resume run --steps 9")  # now it knows

    def test_a_finished_run_samples_without_its_corpus_and_stays_as_it_is(self):
        for flags in ("--warmup-steps 2", "--stream --merges 9", "--val-fraction 0.1 --div-warn 1e9"):
            content, before = self.saved(flags), os.stat("run").st_mtime_ns
            os.rename("input.txt", "away")
            for more in ("", "--steps 0", "--explain emma", "--plot a.svg", "--seed 7 --prompt em"):
                out = self.printed(f"--resume run --samples 2 {more}")
                self.assertEqual((out.count("loss"), out.count("\nsample ")), (0, 2))
                self.assertEqual((self.content("run"), os.stat("run").st_mtime_ns), (content, before))
            os.rename("away", "input.txt")

    def test_a_longer_run_goes_on_in_its_file_or_in_another(self):
        self.saved("--warmup-steps 2 --corpus input.txt")
        self.printed("--resume run --samples 1 --save other")
        self.assertEqual(*(microgpt.read_safetensors(name)[0] for name in ("run", "other")))
        out, path = self.printed("--resume run --steps 5 --lr 0.5"), os.path.join(os.getcwd(), "input.txt")
        self.assertEqual(re.findall(r"step +(\d+) /", out), ["4", "5"])
        kept = {"--lr=0.5", "--steps=5", "--warmup-steps=2", f"--corpus={path}"}
        self.assertLessEqual(kept, {*self.metadata()["flags"]})
        self.printed("--resume run --save ./run --steps 6 --samples 0")  # the same file
        self.printed("--resume run --save next --steps 7 --samples 0")
        self.assertEqual([self.metadata(name)["step"] for name in ("run", "next", "other")], [6, 7, 3])

    def test_fine_tuning_leaves_the_base_and_says_what_it_cannot_read(self):
        base = self.saved("--val-fraction 0.2 --div-warn 1e9")
        self.file("other.txt", "ana\nÉva\neva É\n")
        tune = "--resume run --corpus other.txt --samples 0 --steps 5"  # also on what was held out
        note = "note: .*input.txt.*other.txt.*without ' ', 'É', so 3 characters are left out$"
        self.assertSays(0, note, f"{tune} --val-fraction 0 --seed 7 --save new --trace run.jsonl")
        self.assertEqual(self.content("run"), base)
        self.assertLessEqual({line["documents"][0] for line in self.trace()}, {"ana", "va", "eva"})
        self.file("other.txt", "ÉÉ\n☃\n")
        for more in ("", "--stream --context 2"):
            self.saved(more)
            status, out, errors = self.main(f"{tune} --save another")
            self.assertEqual((status, "step  " in out), (1, False), errors)

    def test_the_example_of_the_section_and_what_other_programs_ask_of_a_file(self):
        microgpt.write_safetensors("tiny", {"w": [[1.0]]}, {})
        text = b'{"__metadata__":{},"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
        wanted = b"\x48" + bytes(7) + text + b"\0\0\0\0\0\0\xf0\x3f"
        self.assertEqual(self.content("tiny"), wanted)
        content, end = self.saved("--arch gpt2 --layers 2 --context 12 --vocab-size 9"), 0
        header, data = unpack(content)
        metadata, model = header.pop("__metadata__"), GPT2(35, 2, 16, 4, 12)
        self.assertEqual(((len(content) - len(data)) % 8, {*map(type, metadata.values())}), (0, {str}))
        self.assertEqual((metadata["format"], json.loads(metadata["config"])), ("pt", vars(model)))
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            start, end = end, end + 8 * math.prod(entry["shape"])
            self.assertEqual((entry["dtype"], entry["data_offsets"]), ("F64", [start, end]))
        self.assertEqual(end, len(data))
        for name, (rows, columns) in model.shapes().items():
            for name in (name, f"optimizer.m.{name}", f"optimizer.v.{name}"):
                self.assertEqual(header.pop(name)["shape"], [rows, columns] if rows > 1 else [columns])
        self.assertEqual(header, {})

    def test_weights_alone_in_single_precision_resume(self):
        header, _ = unpack(self.saved())
        weights, data = self.weights(), b""
        new = {"__metadata__": {**header["__metadata__"], "of another program": '"{["'}}
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
        """Damaged files, each with a pattern of the error."""
        content = self.saved("--d-model 4 --context 4 --layers 1 --vocab-size 2")
        (header, data), length = unpack(content), int.from_bytes(content[:8], "little")
        tensors, metadata = microgpt.read_safetensors("run")
        change = lambda name, key, value: pack({**header, name: {**header[name], key: value}}, data)
        without = lambda dictionary, name: {key: value for key, value in dictionary.items() if key != name}
        files = [content + bytes(8), pack(b"[" * 10**5, data), pack(b"[1, 2]", data)]
        files += [content[:n] for n in (0, 8, length + 8)]
        files += [n.to_bytes(8, "little") + content[8:] for n in (length + 1, 2**63)]
        for old, new in (("optimizer.v.wpe", "optimizer.w.wpe"), ("__metadata__", "a\nb")):
            files.append(pack({new if name == old else name: each for name, each in header.items()}, data))
        for key, values in {"dtype": [None, "F32"], "data_offsets": [None, [0, 0], [-128, 0]],
                            "shape": [None, [], [4, 4, 1], [-4, -4], [2, 8], [4, 10**18]]}.items():
            files += [change("wpe", key, value) for value in values]
        for name, values in {
            "random": [[3, [1, 2], None]], "characters": ["ba", None], "merges": [[[0, 99]], [[0]]],
            "flags": [[None], *[[flag] for flag in "\x1b --steps=x --arch=gpt2".split()]],
        }.items():
            files += [change("__metadata__", name, text) for text in ("[" * 5000, *map(json.dumps, values))]
        microgpt.write_safetensors("run", without(tensors, "optimizer.m.wte"), metadata)
        files.append(self.content("run"))
        microgpt.write_safetensors("run", tensors, without(metadata, "flags"))
        yield "it was not saved by this program: no flags", self.content("run")
        yield from [("it is cut short", content[:-8]), ("it holds BF16", change("wpe", "dtype", "BF16"))]
        yield from [("", file) for file in files]

    def test_a_damaged_file_is_one_line_without_control_characters(self):
        for pattern, file in self.damaged_files():
            self.file("run", file)
            with self.subTest(pattern, file=file[:400], size=len(file)):
                error = f"error: cannot read run: .*{pattern}"
                self.assertEqual(self.assertSays(1, error, "--resume run --steps 4 --samples 0"), "")
                self.assertEqual(self.content("run"), file)

    def test_what_a_corpus_says_is_shown_escaped(self):
        self.file(name := "a\x1b[2J\nmicrogpt: step 5 is saved", "ab\x1b[2Jc\n" * 9)
        flags = "--steps 3 --samples 9 --temperature 9 --save run --explain"
        self.assertNotIn("\x1b", self.printed(flags, "\x1b[2J", f"--corpus={name}"))
        tensors, metadata = microgpt.read_safetensors("run")
        corpus = json.dumps({"paths": [name], "documents": "\x1b[2J"})
        microgpt.write_safetensors("run", tensors, {**metadata, "corpus": corpus, "another's": "{["})
        self.assertNotIn("\x1b", self.assertSays(0, "note: ", "--resume run --steps 5 --samples 9"))

    def test_a_save_is_on_the_disk_before_it_takes_its_place(self):
        events, replace = [], os.replace
        move = lambda part, target: events.append((part, target)) or replace(part, target)
        sync = lambda file: events.append(os.fstat(file).st_size)
        with unittest.mock.patch("os.replace", move), unittest.mock.patch("os.fsync", sync):
            self.saved()
        size, (part, target) = events
        self.assertEqual((size, target), (os.path.getsize("run"), os.path.realpath("run")))
        self.assertEqual(os.path.dirname(part), os.path.dirname(target))
        self.assertIn(str(os.getpid()), os.path.basename(part))  # no other process uses it

    @needs_posix
    def test_links_and_modes_are_kept(self):
        self.saved()
        os.rename("run", "real")
        os.symlink("real", "run")
        os.chmod("real", 0o604)
        self.printed("--resume run --samples 0 --steps 5")
        self.assertEqual((os.path.islink("run"), os.stat("real").st_mode & 0o777), (True, 0o604))
        self.assertEqual((self.metadata("real")["step"], {*os.listdir()}), (5, {"input.txt", "real", "run"}))
        os.symlink("missing", "link")
        self.printed("--steps 1 --samples 0 --save link")
        self.assertEqual((os.path.islink("link"), self.metadata("missing")["step"]), (True, 1))

    def test_running_means_of_another_optimizer_are_not_used(self):
        self.saved("--optimizer momentum")  # leaves v = 0, by which adam would divide
        flags = "--resume run --steps 20 --samples 0 --schedule constant --trace run.jsonl"
        self.assertSays(0, "note: adam starts over, .* momentum$", f"{flags} --optimizer adam")
        self.assertLess(max(line["loss"] for line in self.trace()), 6)
        self.printed(flags)  # from now on it is adam's

    def test_an_overflow_leaves_the_last_good_checkpoint(self):
        content = self.saved()
        for more, step in (("--optimizer adamw --weight-decay 1e9", 3), ("", 4)):
            self.file("run", content)
            flags = "--resume run --steps 9 --schedule constant --save-every 1 --lr 1e300"
            status, _, errors = self.main(f"{flags} {more}")
            self.assertRegex(errors.splitlines()[-1], f"^microgpt: error: .*; step {step} is saved$")
            self.assertEqual((status, self.metadata()["step"]), (1, step))

    def test_a_long_run_keeps_some_thousand_losses(self):
        flags, corpus = "--steps 50000 --save-every 49999 --samples 0 --save run", self.file("a.txt", "ab")
        with unittest.mock.patch.object(microgpt.Workers, "loss_and_grads", lambda *args: (2.0, {})), \
             unittest.mock.patch.dict(microgpt.OPTIMIZERS, adam=lambda *args, **settings: None):
            self.printed(f"{flags} --d-model 2 --heads 1 --context 3 --corpus {corpus}")
        steps = [step for step, _ in microgpt.load("run").losses]
        self.assertTrue(1500 < len(steps) < 5000, len(steps))
        self.assertEqual(len({b - a for a, b in zip(steps, steps[1:])}), 1)
        self.assertLess(os.path.getsize("run"), 300_000)

@needs_posix
class TestInterruptions(Test):
    def test_a_full_disk_leaves_the_old_checkpoint(self):
        self.printed("--steps 3 --samples 0 --save run")
        content, flags = self.content("run"), "--resume run --steps 6 --save-every 2 --samples 0"
        status, out, errors = self.script(flags, preexec_fn=limit("RLIMIT_FSIZE", 20_000))
        warning, error = errors.splitlines()
        self.assertEqual(warning, "microgpt: warning: cannot save run: File too large")
        self.assertRegex(error, "^microgpt: error: cannot save run: File too large")
        self.assertEqual((status, "step    6" in out, self.content("run")), (1, True, content))
        self.assertEqual(sorted(os.listdir()), ["input.txt", "run"])

    def test_a_signal_in_training_ends_the_step_and_saves(self):
        for number in (*STOPS, signal.SIGXCPU):
            self.interrupted("--steps 9 --save run", 4, number)
            self.remove("run")
        code = "import importlib, signal\nsignal.SIGBREAK = signal.SIGUSR2\n" \
               "importlib.reload(microgpt)\nsys.exit(microgpt.main(sys.argv[1:]))\n"
        process = self.start_run("--save run", script=self.driver(code))  # as on Windows
        process.send_signal(signal.SIGUSR2)
        self.assertSaved(process, 128 + signal.SIGUSR2, "interrupted;")

    def test_a_second_signal_ends_at_once_but_not_where_one_comes_twice(self):
        self.file("input.txt", "b" * 149)  # for which a step takes half a second or so
        process = self.start_run("--engine scalar --context 150 --save run", "step +1 ")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        self.assertIn(process.wait(), (130, 143))  # where both arrive together, either may come first
        self.assertRegex(process.stderr.read(), b"^microgpt: interrupted; nothing was saved\n$")
        self.assertFalse(os.path.exists("run"))
        for number in (signal.SIGHUP, signal.SIGXCPU):  # a closing terminal, a limit of time: again and again
            self.interrupted("--steps 9 --save run", 4, number, number)
            self.remove("run")

    def test_a_signal_outside_of_training_ends_at_once(self):
        self.file("long.txt", "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)))
        for flags, until, line in (
            ("--steps 1 --samples 1000000 --save run", "sample 99", "interrupted; step 1 is saved"),
            ("--corpus long.txt --stream --vocab-size 50000", "num docs", "interrupted"),
        ):
            process = self.start_run(flags, until)
            process.send_signal(signal.SIGTERM)
            self.assertEnds(process, 143, line)

    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy does not know what was ignored at its start")
    def test_ignored_signals_stay_ignored(self):
        process = self.start_run("--save run", handler=signal.SIG_IGN)
        for number in STOPS:
            process.send_signal(number)
        self.read_until(process, r"step +\d*99 ")
        self.assertIsNone(process.poll())

    def test_the_work_is_saved_when_the_output_is_lost(self):
        process = self.start_run("--save run", "step +50 ")
        process.stdout.close()
        self.assertEqual((process.wait(), process.stderr.read()), (1, b""))
        self.assertGreaterEqual(self.assertGoesOn(), 49)  # that of the lost line is not made
        self.remove("run")
        with open("out", "wb") as out:  # it becomes too large, not the checkpoint
            flags = "--steps 100000 --d-model 4 --context 4 --gen-every 1 --max-tokens 99 --save run"
            status, _, errors = self.script(flags, stdout=out, preexec_fn=limit("RLIMIT_FSIZE", 60_000))
        self.assertEqual(status, 1)
        self.assertRegex(errors, "\nmicrogpt: error: cannot write the output: File too large[^\n]*\n$")
        self.assertGoesOn()

# 18. Looking inside ---------------------------------------------------------------------------------------

class Explained:
    """What --explain prints: rows of words, the means, maps[layer][head] as rows of shades from 0 to 4."""
    def __init__(self, out):
        table, *maps = out[out.index("\ntoken") + 1 :].split("\n\nlayer ")
        self.lines = table.splitlines()[1:]
        *self.rows, mean = [line.split() for line in self.lines]
        self.means, self.maps, self.heads = list(map(float, mean[1:])), {}, []
        for block in maps:
            title, top, *rows = block.rstrip("\n").splitlines()
            places = [place.span() for place in re.finditer(r"\S+", top)]  # cells, by names above
            self.heads.append([top[start:end] for start, end in places])
            self.maps[int(title.split(",")[0])] = [
                [[*map("·░▒▓█".index, row[start:end].rstrip())] for row in rows] for start, end in places]

class TestExplain(Test):
    def test_numbers_and_shades_against_a_computation_by_hand(self):
        self.file("input.txt", "emma\nolivia\nava\nnoah\nliam\n")
        names = [*sorted(set("emmaolivianoah")), "^"]
        ids = [names.index(char) for char in "^emma^"]
        for arch in ("gpt2", "microgpt"):
            flags = f"--arch {arch} --layers 2 --d-model 8 --context 8 --lr 0.1 --samples 0 --explain emma"
            out, logs = self.printed(f"{flags} --steps 40 --save {arch}"), []
            Value(2.0) * 3  # which a notebook may have left
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
            self.assertEqual((got.maps, got.heads), (dict(enumerate(shades)), [["^emma"] * 4] * 2))
        self.assertGreater(len({shade for rows in shades[1] for shade in rows[4]}), 2)  # not all the same

    def test_odd_characters_keep_to_their_columns(self):
        text = "a\t \\'\"é☃a^bcdefg"
        self.file("input.txt", f"{text}\n{text}")
        for more in "--heads 12", "--heads 1 --merges 2", "--context 99 --lr 1e3":
            out = self.printed(f"--d-model 24 --steps 6 --samples 0 {more}", "--explain", text * 6)
            got = Explained(out)
            self.assertEqual(re.findall("inf|nan", out), [])
            self.assertTrue(all(line.isprintable() for line in out[out.index("\ntoken") :].split("\n")))
            self.assertEqual(len({line.index(".") for line in got.lines[:-1]}), 1)
            for rows in got.maps[0]:
                self.assertEqual([*map(len, rows)], [*range(1, min(len(got.rows), 30) + 1)][-len(rows) :])

    def test_a_wide_or_combining_character_takes_its_columns(self):
        self.file("input.txt", "語a\nae\u0301\n")
        out = self.printed("--steps 2 --samples 0 --explain 語ae\u0301")
        columns = lambda text: len(text) + text.count("語") - text.count("\u0301")
        rows = out[out.index("\ntoken") :].split("\n\n")[0].splitlines()[2:-1]
        self.assertEqual(({columns(row[: row.index(".")]) for row in rows}, len(rows)), ({13}, 5))

    def test_a_long_text_is_explained_up_to_the_context(self):
        self.file("short.txt", "em\nma\n")
        for flags, pairs in (("--context 4 --explain emmaava", "^e em mm ma"), ("--explain=", "^^"),
                             ("--stream --context 4 --explain av", "av")):
            got = Explained(self.printed(f"--steps 1 --samples 0 {flags}"))
            self.assertEqual(["".join(row[:2]) for row in got.rows], pairs.split())
        for text, note in ("emm", ""), ("emma", "note: --explain shows only .* --context 4 holds"):
            self.assertSays(0, note, f"--steps 0 --samples 0 --context 4 --corpus short.txt --explain {text}")

    def test_shades_are_what_the_encoding_of_the_output_has(self):
        self.printed("--steps 2 --samples 0 --save run")
        for encoding, shades in (("utf-8", "·░▒▓█"), ("cp1252", ".:+%#"), ("ascii", ".:+%#")):
            env = {"PYTHONIOENCODING": encoding}
            process = self.start("--resume run --samples 0 --explain emma", env=env)
            out = process.communicate()[0].decode(encoding)
            self.assertNotIn("\\", out)
            self.assertIn(f"from {shades[0]} under 1/8 to {shades[-1]} over 7/8", out)
            maps = out.split("7/8")[1].split(" ^emma ^emma")[1]
            self.assertLessEqual({*maps}, {*" \r\n^ema", *shades})

class Picture:
    """A picture: its curves in places, and as (step, loss) read off the ticks."""
    def __init__(self, name):
        self.svg = read(name)
        root = ElementTree.fromstring(self.svg)  # fails on what is no XML
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
    def picture(self, run, points, validations):
        """The picture of a finished run with these losses."""
        run.losses, run.validations = points, validations
        run.save("drawn")
        self.printed("--resume drawn --samples 0 --plot a.svg")
        return Picture("a.svg")

    def test_curves_and_ticks_of_any_losses(self):
        self.printed("--steps 1 --samples 0 --d-model 4 --context 2 --save run")
        run, rng = microgpt.load("run"), random.Random(2)
        cases = [([], []), ([], [(50, 2.5)]), ([(9, 0.0)], []), ([(1, 1e99)] * 3, [])]
        for n in [1, 2, 3, 10, 100, 1000] * 3:
            first, (low, high) = int(10 ** rng.uniform(0, 6)), [10 ** rng.uniform(-6, 6) for _ in "ab"]
            points = [(step, rng.uniform(low, high)) for step in range(first, first + n)]
            cases.append((points, points[1::2]))
        for points, validations in cases:
            picture = self.picture(run, points, validations)
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
                    low, *_, high = sorted(loss for _, loss in points)
                    for (x, y), (step, loss) in zip(picture.data(name), wanted):
                        self.assertAlmostEqual(x, step, delta=len(points) / 500)
                        self.assertAlmostEqual(y, loss, delta=(1.01 * high - low) / 500)
        means = self.picture(run, [(i, i % 2 + 1.0) for i in range(900)], []).data("mean")
        self.assertTrue(all(abs(mean - 1.5) < 0.02 for _, mean in means[100:]))

    def test_a_run_draws_its_losses_even_where_it_ends_early(self):
        watched = "--steps 30 --val-fraction 0.4 --eval-every 7 --div-warn 1e9"
        for status, flags, curves in ((0, watched, [30, 30, 5]), (1, "--optimizer sgd --lr 1e99", [3, 3, 0])):
            self.file("run.svg", "<svg of another run")
            got, out, _ = self.main(f"{flags} --samples 0 --plot run.svg")
            picture = Picture("run.svg")
            self.assertEqual((got, list(map(len, picture.curves.values()))), (status, curves))
            for (x, y), (step, loss) in zip(picture.data("loss") * (not status), enumerate(losses(out), 1)):
                self.assertAlmostEqual(x, step, delta=0.1)
                self.assertAlmostEqual(y, float(loss), delta=0.01)
            self.assertEqual(sorted(os.listdir()), ["input.txt", "run.svg"])

class TestTrace(Test):
    def test_its_numbers_are_those_of_the_run(self):
        flags = "--steps 12 --batch-size 3 --warmup-steps 4 --seed 7 --samples 0 --clip-grad 0.1"
        self.file("run.jsonl", '{"flags": ["of another run"]}\n')
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
        loss, grads = microgpt.loss_and_grads(GPT(26), self.weights(), lines[0]["tokens"])
        for name, rows in grads.items():  # before clipping
            self.assertClose(lines[0]["gradients"][name], rows, 1e-12)
        told, norm = lines[0], math.sqrt(sum(g * g for g in flat(grads)))
        self.assertClose([[told["loss"], told["gradient_norm"]]], [[loss, norm]], 1e-12)
        self.assertEqual(list(told["gradients"]), list(grads))

    def test_it_has_all_that_a_port_needs(self):
        layer = "linear linear linear attention linear add rmsnorm linear relu linear add".split()
        lean = ["embed", "embed", "add", "rmsnorm", "rmsnorm", *layer, "linear", "cross_entropy"]
        other = "--stream --vocab-size 9 --arch gpt2 --batch-size 2 --workers 2"
        for flags, names in (("", lean), (other, None)):
            self.remove("start", "run.jsonl")
            self.printed(f"{flags} --steps 0 --samples 0 --save start")
            self.printed(f"{flags} --steps 2 --samples 0 --trace run.jsonl")
            first, step = json.loads(self.content("run.jsonl").splitlines()[0]), self.trace()[0]
            metadata = self.metadata("start")
            for name in ("characters", "merges", "config", "random"):
                self.assertEqual(first[name], metadata[name])
            self.assertEqual((first["step"], first["weights"]), (0, self.weights("start")))
            self.assertEqual(first["bos"], first["config"]["vocab_size"] - 1)
            told, results = zip(*step["operations"])
            self.assertEqual(list(told), names or list(told))
            self.assertAlmostEqual(results[-1], step["loss"], 12)
            rows = [row for tokens in step["tokens"] for row in by_hand(first["weights"], tokens[:-1], 4)[0]]
            self.assertClose(results[-2], rows)
        self.assertEqual({*told}, {*lean, "multiply", "gelu"} - {"relu"})

    def test_a_resumed_run_cuts_what_is_beyond_its_step(self):
        flags = "--samples 0 --schedule constant --batch-size 2 --trace"
        self.printed(f"--steps 9 {flags} whole.jsonl")
        self.printed(f"--steps 4 {flags} run.jsonl --save run")
        whole, four, checkpoint = map(self.content, ("whole.jsonl", "run.jsonl", "run"))
        lines, begin = whole.splitlines(True), four.splitlines(True)[0]  # which names other flags
        steps = b"".join(lines[1:])
        self.assertEqual(four, begin + b"".join(lines[1:5]))
        beyond = b"".join(lines[5:7]).replace(b'"loss"', b'"lost"')
        more = b"", beyond, lines[5][:40], beyond + lines[7][:-1], beyond + b"\xff\x00"
        torn = b"".join(lines[1:4] + lines[5:])  # where a disk was full in step 4
        early = begin + b"".join([*lines[1:4], lines[6], lines[4]])
        cases = [(four + each, steps) for each in more] + [(four[:-9], torn), (early, torn)]
        for before, after in [*cases, (b"", b"".join(lines[5:]))]:
            self.file("run.jsonl", before)
            self.file("run", checkpoint)
            self.printed(f"--resume run --steps 9 {flags} run.jsonl")
            got = self.content("run.jsonl").splitlines(True)
            self.assertEqual((got[0] if before else begin, b"".join(got[1:])), (begin, after), before)

    def test_the_trace_of_another_run_stays_as_it_is(self):
        self.printed("--steps 2 --samples 0 --save run")
        self.printed("--steps 4 --layers 2 --samples 0 --trace run.jsonl")
        before = self.content("run.jsonl")
        self.assertRefused(1, "run.jsonl: it is the trace of another", "--resume run --steps 3 --trace run.jsonl")
        self.assertEqual(self.content("run.jsonl"), before)

    def test_each_line_is_there_when_its_step_is_done(self):
        process = self.start_run("--trace run.jsonl", "step +20 ")
        process.kill()
        lines = self.content("run.jsonl").splitlines()[:20]
        self.assertEqual([json.loads(line)["step"] for line in lines], [*range(20)])

    def test_each_line_is_json_even_of_an_overflow(self):
        huge = lambda workers, model, weights, batch: (2.0, {name: [[1e200] * len(row) for row in rows]
                                                             for name, rows in weights.items()})
        with unittest.mock.patch.object(microgpt.Workers, "loss_and_grads", huge):
            self.printed("--optimizer sgd --lr 0 --steps 2 --samples 0 --trace run.jsonl")
        for line in self.content("run.jsonl").splitlines():
            json.loads(line, parse_constant=self.fail)

    def test_no_file_is_left_open(self):
        flags = "--steps 4 --samples 0 --val-fraction 0.2 --plot a.svg --trace a.jsonl --save run"
        status, _, errors = self.script(SCRIPT, *flags.split(), script="-Wdefault")
        self.assertEqual((status, errors), (0, ""))

# 19. Training ---------------------------------------------------------------------------------------------

class TestCorpus(Test):
    def test_globs_are_sorted_and_each_file_is_read_once(self):
        os.makedirs("deep/er.txt/est")
        for name, text in (("a.txt", "x\ny\n"), ("b.txt", "z\n"), ("deep/er.txt/c.txt", "w\nv\n")):
            self.file(name, text)
        globs = ["b.txt", "./a.txt", "?.txt", "a.txt"], ["[ab].txt"], ["**/*.txt"], ["deep/**"]
        outs = [self.printed("--steps 9 --samples 2", *[f"--corpus={glob}" for glob in each])
                for each in globs]
        self.assertEqual((outs[0], outs[0][:26]), (outs[1], "num docs: 3\nvocab size: 4\n"))
        self.assertEqual([out.split("\n")[0] for out in outs[2:]], ["num docs: 65", "num docs: 2"])

    @needs_posix
    def test_links_and_pipes(self):
        self.file("a.txt", "ab\n")
        os.symlink("a.txt", "link.txt")
        os.makedirs("folder")
        os.symlink("..", "folder/up")
        for pattern in ("*k.txt", "[al]*.txt", "**/a.txt"):
            out = self.printed("--steps 1 --samples 0 --context 4", f"--corpus={pattern}")
            self.assertTrue(out.startswith("num docs: 1\n"), (pattern, out[:20]))
        reader, writer = os.pipe()
        os.write(writer, b"ab\nc\n")
        os.close(writer)
        flags = "--corpus /dev/stdin --steps 2 --samples 0 --save run"
        self.assertEqual(self.script(flags, stdin=reader)[::2], (0, ""))
        os.close(reader)
        self.assertIn("sample  1: ", self.printed("--resume run --samples 1"))

    def test_odd_names_of_files(self):
        self.file("a1.txt", "c\n")
        names = ["a[1].txt", "é☃.txt", "-x.txt", "%s {}.txt", "it's a name.txt"]
        for i, name in enumerate(names + ["a\n'name'*.txt"] * (os.name == "posix"), 2):
            self.file(name, "ab\n" * i)
            for flags in [f"--corpus={name}", f"--save={name}s"], ["--steps=2", f"--resume={name}s"]:
                self.assertIn(f"num docs: {i}\n", self.printed("--samples=1 --steps=1", *flags))

    def test_documents_are_lines_and_a_stream_is_all_of_it(self):
        self.file("a.txt", "\ufeffone\r\n\r\n two \n\ufeff\n\nth\ufeffree")  # no line end
        self.file("b.txt", "34")
        flags = "--corpus a.txt --corpus b.txt --context 21 --steps 1 --samples 0 --trace run.jsonl"
        stream = "one\n\n two \n\n\nthree\n34\n"
        for more, wanted in (("4", ["34", "one", "three", "two"]), ("1 --stream", [stream])):
            self.assertIn(f"num docs: {len(wanted)}\n", self.printed(f"{flags} --batch-size {more}"))
            self.assertEqual(sorted(self.trace()[0]["documents"]), wanted)

    def test_documents_that_are_cut_are_told(self):
        self.file("long.txt", "abcd\nabcde\nabcdef\n")  # and an end, which is a token, too
        self.file("one.txt", "acgt" * 9)
        for flags, note in (
            ("long.txt --context 5", "note: 2 of 3 documents exceed --context 5"),
            ("long.txt --context 3", "note: 3 of 3 documents exceed"), ("long.txt --context 7", ""),
            ("long.txt --context 3 --stream", ""), ("one.txt", "note: 1 of 1 documents .*--stream"),
        ):
            self.assertSays(0, note, f"--steps 1 --samples 0 --corpus {flags}")

    def test_windows_of_a_stream_go_by_seed_and_step(self):
        path, windows = self.file("text.txt", letters := "abcdefghijklmnopqrstuvwxyz"), []
        flags = f"--corpus {path} --stream --context 4 --samples 0 --batch-size 8 --trace run.jsonl"
        for more in ("20", "20", "10", "20 --seed 7"):
            self.printed(f"{flags} --steps {more}")
            windows.append([window for line in self.trace() for window in line["documents"]])
        self.assertEqual((windows[0], windows[0][:80]), (windows[1], windows[2]))
        self.assertNotEqual(windows[0], windows[3])
        self.assertEqual({*windows[0]}, {f"{letters}\n"[i : i + 5] for i in range(23)})  # from all of it

    def test_input_txt_here_or_the_shipped_one(self):
        self.assertIn("num docs: 60\n", self.printed("--steps 1 --samples 0"))
        os.remove("input.txt")
        self.assertIn(f"num docs: {len(SHIPPED)}\nvocab size: 27\n", self.printed("--steps 1 --samples 1"))
        status, out, errors = self.script(script=shutil.copy(SCRIPT, "alone.py"))  # with none beside it
        self.assertEqual((status, out, os.listdir()), (1, "", ["alone.py"]))
        self.assertRegex(errors, "^microgpt: error: .*input.txt[^\n]*\n$")

    def test_a_run_knows_its_corpus_in_any_folder(self):
        self.printed("--steps 4 --samples 0 --save default")
        self.printed("--corpus input.txt --steps 4 --samples 0 --save named")
        os.makedirs("elsewhere")
        os.chdir("elsewhere")
        self.file("input.txt", "zz\n")
        for name in ("default", "named"):
            self.assertIn("num docs: 60\n", self.printed(f"--resume ../{name} --steps 6 --samples 0"))
        os.chdir("..")
        for names in (SHIPPED[:61], SHIPPED[1:61]):
            self.file("input.txt", "\n".join(names))
            self.printed("--resume default --steps 6 --samples 0")  # which reads nothing
            note = rf"note: .*input.txt \(60 doc.*\({len(names)} documents\)"
            self.assertSays(0, note, f"--resume named --steps 8 --samples 0 --save {names[0]}")
        self.file("input.txt", "\n".join(SHIPPED[:60]))
        os.rename("input.txt", "moved.txt")
        self.assertRefused(1, "cannot read .*input.txt: No such file.* --corpus", "--resume default --steps 8")
        self.printed("--resume default --corpus moved.txt --steps 8 --samples 0")  # the same text: no note
        self.assertEqual(self.metadata("default")["step"], 8)

class TestTraining(Test):
    def validated(self, flags, ids):
        """Train, and hold the validation loss against one by hand: the mean over all tokens of some documents
        but the first of each. Returns the documents trained on."""
        out = self.printed(f"--val-fraction {flags} --div-warn 1e9 --samples 0 --save run --trace run.jsonl")
        trained = {doc for line in self.trace() for doc in line["documents"]}
        logs = list(chain(*[loss_by_hand(self.weights(), doc) for doc in ids(trained)]))
        self.assertEqual(f"{statistics.mean(logs):.4f}", re.search(r"validation (\S+)\n", out)[1])
        os.remove("run")
        return trained

    def test_held_out_documents_are_never_trained_on(self):
        docs = ["a", "bc", "cab" * 9, "bbbb", "ccccab" * 3, "ab", "acab", "cc", "aab", "abcabcabcabcabcabc"]
        others = lambda trained: [doc for doc in docs if doc[:16] not in {other[:16] for other in trained}]
        ids = lambda trained: [[3, *map("abc".index, doc), 3][:17] for doc in others(trained)]
        for fraction, n in ((0.3, 3), (0.01, 1), (0.9, 9)):
            self.file("input.txt", "\n".join(docs))
            trained = self.validated(f"{fraction} --steps 20 --batch-size 2 --eval-every 20", ids)
            self.assertEqual((len(trained), len(others(trained))), (10 - n, n))
        self.file("input.txt", "\n".join(docs + docs[:5] * 3))  # copies stand on one side
        trained = self.validated("0.3 --steps 20 --batch-size 2 --eval-every 20", ids)
        self.assertTrue(0 < len(others(trained)) < 8)
        self.file("input.txt", "ab\n" * 100)
        self.assertRefused(1, "hold out", "--val-fraction 0.3 --steps 3")

    def test_the_end_of_a_stream_is_held_out(self):
        text = "".join(random.Random(1).choices("abc", k=110)) + "d" * 9 + "\n"
        end, flags = list(map("\nabcd".index, text[96:])), f"--corpus {self.file('text.txt', text)} --stream"
        windows = lambda trained: [end[start : start + 5] for start in range(0, 23, 4)]
        trained = self.validated(f"0.2 {flags} --context 4 --steps 30 --batch-size 8", windows)
        self.assertNotIn("d", "".join(trained))

    def test_the_loss_beside_it_is_the_mean_since_the_last(self):
        out = self.printed("--steps 7 --eval-every 3 --val-fraction 0.2 --div-warn 1e9 --samples 0")
        each, told = list(map(float, losses(out))), re.findall(r"loss (\S+) on average", out)
        self.assertEqual(re.findall(r"step +(\d) / +7 \| loss \S+ on", out), ["3", "6", "7"])
        for mean, part in zip(told, (each[:3], each[3:6], each[6:])):
            self.assertAlmostEqual(float(mean), statistics.mean(part), delta=1.01e-4)

    def test_with_merges_the_loss_per_character_is_told(self):
        flags = "--steps 8 --batch-size 8 --val-fraction 0.3 --samples 0 --div-warn 1e9 --trace run.jsonl"
        out, run = self.printed(f"{flags} --merges 12 --save run"), microgpt.load("run")
        docs = {*SHIPPED[:60]} - {doc for line in self.trace() for doc in line["documents"]}
        end = [run.tokenizer.bos]
        logs = list(chain(*[loss_by_hand(run.weights, run.encode(doc) + end) for doc in docs]))
        characters = sum(len(doc) + 1 for doc in docs)  # the end counts as one
        told = re.search(r"validation (\S+) \| (\S+) per character\n", out).groups()
        self.assertEqual(told, (f"{statistics.mean(logs):.4f}", f"{sum(logs) / characters:.4f}"))
        self.assertNotIn("per character", self.printed(flags))

    def test_without_steps_a_share_held_out_is_still_validated(self):
        out = self.printed("--steps 9 --val-fraction 0.2 --samples 0 --div-warn 1e9 --save run")
        again = self.printed("--resume run --steps 0 --val-fraction 0.2 --samples 0")
        validation = re.compile(r"validation (\S+)\n")
        self.assertEqual(validation.findall(again), validation.findall(out))
        fresh = self.printed("--steps 0 --val-fraction 0.2 --samples 0")
        self.assertAlmostEqual(float(validation.findall(fresh)[0]), math.log(26), delta=0.2)

    def test_the_gap_that_warns_and_the_gap_that_stops(self):
        flags = "--corpus text.txt --stream --steps 12 --eval-every 12 --lr 0.05 --samples 0"
        for n, low, high in ((3, 3, 20), (7, 21, 99)):
            self.file("text.txt", "aa\n" * 100 + "a\n\n" * n + "aa\n" * (12 - n))
            _, out, errors = self.main(f"{flags} --div-warn 0")
            loss, validation = map(float, re.search(r"loss (\S+) on .* validation (\S+)\n", out).groups())
            gap = int(re.search(r"at step 12 the validation loss is (\d+) ?% above the training", errors)[1])
            self.assertAlmostEqual(gap, (validation / loss - 1) * 100, delta=0.6)
            self.assertTrue(low < gap < high, gap)
            warning = f"warning: at step 12 the validation loss is {gap}% above the training loss$"
            for more, said in (("--val-fraction 0.1", warning * (gap > 20)), (f"--div-warn {gap + 1}", ""),
                               (f"--div-crit {gap + 1} --div-warn {gap - 1}", warning)):
                self.assertSays(0, said, f"{flags} {more}")
            self.assertSays(1, "error: at step 12 .*; step 12 is saved$",
                            f"{flags} --div-crit {gap - 1} --save run{n}")

    def test_watching_changes_nothing(self):
        watching = "--gen-every 5 --save-every 3 --save run --trace run.jsonl --plot run.svg"
        plain, watched = (self.printed(f"--steps 12 --samples 3 {flags}") for flags in ("", watching))
        self.assertEqual(losses(plain), losses(watched))
        self.assertEqual(len(re.findall(r"^sample at step (5|10): ", watched, re.M)), 2)
        self.assertEqual(*(out[out.index("--- inference") :] for out in (plain, watched)))
        flags = "--steps 12 --val-fraction 0.2 --stream --context 4 --div-warn 1e9 --eval-every"
        self.assertEqual(*(losses(self.printed(f"{flags} {n}")) for n in (3, 12)))

    def test_full_memory_is_one_line_and_the_work_is_saved(self):
        adam = unittest.mock.Mock(side_effect=[None] * 2 + [MemoryError])
        with unittest.mock.patch.dict(microgpt.OPTIMIZERS, adam=lambda *args, **settings: adam()):
            self.assertSays(1, "error: .*memory; step 2 is saved$", "--save run")
        self.assertEqual(self.metadata()["step"], 2)

    def test_autotune_prints_a_command_that_runs(self):
        flags = "--steps 2 --merges 3 --corpus input.txt --prompt=e --samples 1 --save run --autotune"
        status, out, errors = self.script(f"{flags} --batch-sizes 1,3 --worker-counts 1,2")
        self.assertEqual((status, errors, os.listdir()), (0, "", ["input.txt"]))
        rows = re.findall(r"^ +(\d+) +(\d+) +(\w+) +\d+ +0:", out, re.M)
        self.assertEqual(rows, [("1", "1", "tensor"), ("3", "1", "tensor"), ("3", "2", "tensor")])
        _, script, *words = shlex.split(out.splitlines()[-1])
        best = dict(word.split("=") for word in words)
        self.assertIn(tuple(best[f"--{name}"] for name in ("batch-size", "workers", "engine")), rows)
        self.assertEqual(script, SCRIPT)
        status, out, errors = self.script("", *words)
        self.assertEqual((status, errors, "sample  1: e" in out, losses(out)[2:]), (0, "", True, []))
        self.assertEqual(self.metadata()["merges"] and self.metadata()["step"], 2)
        tune = "--resume run --autotune --batch-sizes 1,2 --worker-counts 1 --steps"
        self.assertIn("--batch-size=", self.printed(f"{tune} 9"))
        self.assertRefused(2, "steps left to make", f"{tune} 2")

    def test_autotune_goes_on_after_what_fails(self):
        class Failing(microgpt.Workers):
            def __init__(self, n, engine):
                self.n = n
                super().__init__(1, engine)

            def loss_and_grads(self, model, weights, batch):
                if len(batch) == 2:
                    raise (MemoryError if self.n == 2 else microgpt.UserError("no GPU"))
                return super().loss_and_grads(model, weights, batch)

        flags = "--steps 5 --autotune --worker-counts 1,2 --batch-sizes"
        with unittest.mock.patch("microgpt.Workers", Failing):
            out = self.printed(f"{flags} 2,1")
            self.assertRegex(out, r"\n +2 +1 +tensor +no GPU\n +2 +2 +tensor +.*memory\n +1 +1 +tensor +\d")
            self.assertIn("--batch-size=1 --workers=1 --engine=tensor", out.splitlines()[-1])
            self.assertSays(1, "error: none ", f"{flags} 2")

class TestLibrary(Test):
    DOCS = ["emma", "anna", "otto", "hanna", "ada", "mona"]

    def learned(self, **settings):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return microgpt.learn(self.DOCS, **{"steps": 20, "n_embd": 8, "seed": 1, **settings})

    def test_probabilities_and_losses_are_those_of_the_model_by_hand(self):
        for settings in {}, {"merges": 3, "n_layer": 2}, {"arch": "gpt2"}:
            run = self.learned(**settings)
            got, end = run.probabilities("em"), run.tokenizer.bos
            ids = [end, *run.tokenizer.encode("em")]
            self.assertEqual(list(got), [*run.tokenizer.tokens, ""])
            self.assertClose([[*got.values()]], [softmax(by_hand(run.weights, ids, 4)[0][-1])])
            logs = loss_by_hand(run.weights, [*ids, end])
            self.assertAlmostEqual(run.loss("em"), statistics.mean(logs), 12)

    def test_samples_begin_with_the_prompt_and_repeat_with_the_seed_or_from_a_file(self):
        run = self.learned()
        texts = [run.generate("ha", temperature=t, rng=random.Random(7)) for t in (0.3, 0.3, 5)]
        self.assertEqual((texts[0], {text[:2] for text in texts}), (texts[1], {"ha"}))
        self.assertNotEqual(texts[0], texts[2])
        self.assertLessEqual({*run.generate("e", max_tokens=3)[1:]}, {*"".join(self.DOCS)})
        self.assertGreater(len({run.generate() for _ in range(10)}), 1)
        self.assertEqual({run.generate(temperature=0) for _ in range(3)}, {run.generate(top_k=1)})
        run.save("run")
        again = microgpt.load("run")
        self.assertEqual((again.step, again.weights), (run.step, run.weights))
        self.assertEqual([again.generate("a") for _ in range(5)], [run.generate("a") for _ in range(5)])
        self.assertIn("sample  1: ", self.printed("--resume run --samples 1"))

    def test_a_stream_is_all_texts_together(self):
        run = self.learned(stream=True, block_size=8)
        self.assertEqual({*run.tokenizer.ids}, {"\n", *"".join(self.DOCS)})

    def test_what_cannot_be_is_a_clear_error(self):
        run = self.learned(block_size=4)
        for pattern, wrong in (
            ("from 1 to 4 tokens, not", lambda: run.probabilities("annaa")),
            ("from 1 to 4 tokens, not", lambda: run.probabilities("emmaemma")),
            ("without 'z'", lambda: run.generate("z")), ("stepz", lambda: self.learned(stepz=5)),
            ("--lr", lambda: self.learned(lr=-1)), ("without 'z'", lambda: self.learned(prompt="z")),
            ("no corpus", lambda: self.learned(resume="run")), ("needs a path", run.save),
        ):
            with self.assertRaisesRegex(microgpt.UserError, pattern):
                wrong()

    def test_ctrl_c_lets_the_step_end_and_saves_it(self):
        def interrupt(run, *_):
            if run.step == 4:
                signal.raise_signal(signal.SIGINT)
        before = signal.getsignal(signal.SIGINT)
        with unittest.mock.patch.object(microgpt, "show_progress", interrupt):
            self.assertRaises(KeyboardInterrupt, self.learned, save="run")
        self.assertEqual((microgpt.load("run").step, signal.getsignal(signal.SIGINT)), (5, before))

    def test_its_run_goes_on_with_the_same_texts_or_in_another_file(self):
        self.learned(save="run")
        self.assertRefused(2, "a new --save", "--resume run --steps 30")  # with input.txt
        self.file("docs.txt", "\n".join(self.DOCS))
        self.printed("--resume run --steps 30 --samples 0 --corpus docs.txt")
        self.assertEqual(self.metadata()["step"], 30)

# 20. The command line -------------------------------------------------------------------------------------

NO_FLAGS = {"corpus": "input.txt", "div-warn": "20", "max-tokens": "the context", "batch-sizes": "1,2,4,8,16"}
SIZES = "--layers --d-model --heads --context --batch-size --max-tokens --workers --save-every".split()
NUMBERS = "--lr --temperature --clip-grad --weight-decay --div-warn --div-crit".split()
AGAIN = "--resume run --steps 9"
REFUSALS = [  # status, pattern of the one line of error, flags
    (1, "cannot read .*missing", "--corpus missing"), (1, r"cannot read .*no-\*.txt", "--corpus no-*.txt"),
    *[(1, f"too little text in .*{name}.txt$", f"--corpus {name}.txt") for name in ("empty", "blank")],
    (1, "cannot read .*latin.txt: 'utf-8' codec can't decode byte 0xe9", "--corpus latin.txt"),
    (1, "cannot read .*wide.txt: .*UTF-16", "--corpus wide.txt"),
    (1, r"cannot read .*\\x1b\[2J\\n: No such", "--corpus \x1b[2J\n"),
    (1, "read .*folder.svg", "--corpus folder.svg"), (1, "cannot read|too little", f"--corpus {os.devnull}"),
    (1, "too short for a context of 3", "--corpus short.txt --stream --context 3"),
    (1, "too little text in .*short.txt$", "--corpus short.txt --val-fraction 0.1"),
    (1, "too short for a context of 2", "--corpus 5.txt --stream --context 2 --val-fraction 0.1"),
    (1, r"without 'é' \(U\+00E9\)", "--prompt e\u0301é"), (1, "'☃'", "--explain ☃"),
    *[(1, rf"without '{shown}' \(U\+", f"--prompt {char}")
      for shown, char in (("\u0301", "e\u0301"), (r"\\u200b", "\u200b"))],
    (2, "two tokens", "--stream --explain e"), (2, "--prompt.*(--prompt|flag|--flag)=", "--prompt -x+3="),
    (2, "--heads 3 does not divide --d-model 16", "--heads 3"), (2, "arguments: --nonsense", "--nonsense"),
    (2, "arguments: --temp", "--temp 1"), (2, "3 is more than --batch-size 2", "--batch-size 2 --workers 3"),
    (2, "--eps.*'0' must be a number", "--eps 0"),
    (2, "--workers.*below", "--workers 1000 --batch-size 1000"),
    *[(2, f"{flag}\\b.*'{value}' .*whole number.* 1\\b", f"{flag}={value}")
      for flag in SIZES for value in ("0", "-1", "x", "1.5", "")],
    *[(2, f"{flag}\\b.*number.* 0\\b", f"{flag}={value}")
      for flag in NUMBERS for value in ("-1", "nan", "inf", "x", "")],
    *[(2, f"{flag}\\b.* 0 .*below 1\\b", f"{flag}={value}")
      for flag in ("--beta1", "--beta2", "--val-fraction") for value in ("-1", "1", "nan")],
    *[(2, f"{name}.*invalid choice", f"--{name} gpt5") for name in "arch engine optimizer schedule".split()],
    *[(2, flags.split("=")[0], flags) for flags in (
        "--warmup-steps=-1", "--batch-sizes=1,0", "--worker-counts=x", f"--steps={'9' * 5000}",
        "--save=", "--plot=run", "--plot=", "--trace=run.svg")],
    *[(2, "the model is too large", flags)
      for flags in ("--d-model 99999 --heads 1", "--layers 999999", "--context 999999999")],
    *[(2, "writable folder.*nowhere", f"--{flags}")
      for flags in ("save nowhere/a", "plot nowhere/a.svg", "trace nowhere/a.jsonl")],
    (1, "folder.svg", "--plot=folder.svg"), (1, r"cannot write \.", "--save ."),
    (1, "cannot write other.txt", "--save other.txt"),
    (1, "cannot write of-another.safetensors: .*not saved by this program", "--save of-another.safetensors"),
    *[(2, "two purposes", flags) for flags in (
        "--save input.txt/", "--save a.svg --plot a.svg", "--save a.jsonl --trace ./a.jsonl",
        "--corpus text.svg --plot text.svg", "--corpus text.jsonl --trace text.jsonl",
        "--resume r.svg --plot r.svg", "--resume r.jsonl --steps 5 --trace r.jsonl")],
    *[(2, "something else", flags)
      for flags in ("--trace text.jsonl", "--trace r.jsonl", "--plot text.svg", "--plot r.svg")],
    (2, "run holds a run of 3 steps: .*--resume run.* another name", "--save run"),
    (2, "base holds a run of 3 steps", f"{AGAIN} --save base"),
    (1, "missing", "--resume missing"), (1, "input.txt", "--resume input.txt"), (1, "''|read", "--resume="),
    *[(2, "new --corpus needs a new --save|two purposes", f"{AGAIN} --corpus other.txt {more}".rstrip())
      for more in ("", "--save run", "--save ./run")],
    (2, "run has made its 3 steps; --steps", "--resume run --corpus other.txt --save new"),
    (2, "run was made with another --stream$", "--resume run --stream"),
    (2, "another .*--val-fraction.*held out", "--resume run --val-fraction 0.5"),
    *[(2, f"run was made with another --{flag.split()[0]}$", f"{AGAIN} --{flag}")
      for flag in ("n-layer 2", "n-embd 32", "n-head 2", "block-size 8", "arch gpt2", "merges 5")],
    *[(2, f"another .*--{flags.split()[0]}.*held out", f"{AGAIN} --{flags}")
      for flags in ("seed 1", "val-fraction 0.1", "val-fraction 0", "seed 7 --corpus input.txt")],
]
POSIX_REFUSALS = [
    (1, "cannot write pipe", "--save pipe"), (1, "cannot write pipe", "--trace pipe.jsonl"),
    (2, "two purposes", "--corpus other.txt --save link.txt"),
    (1, "cannot write n+: File name too long", f"--save {'n' * 256}"),
]

class TestCommandLine(Test):
    @unittest.skipUnless(os.path.exists(GOLDEN), "needs what the reference prints, in ../shared")
    def test_the_default_run_prints_what_the_reference_prints(self):
        shutil.copy(NAMES, "input.txt")
        status, out, errors = self.script(env={"PYTHONUNBUFFERED": ""})
        self.assertEqual((status, errors, out.count("\r")), (0, "", 1000))
        self.assertEqual(re.sub("\r\n?", "\n", out), read(GOLDEN))

    def test_nothing_but_the_text_of_the_reference_where_there_is_no_terminal(self):
        out = self.script("--steps 3 --samples 1", env={"PYTHONUNBUFFERED": None})[1]
        head, loss = r"num docs: 60\nvocab size: 26\nnum params: 4160\n", r"step +\d / +3 \| loss \d\.\d{4}\r"
        tail = r"\n--- inference \(new, hallucinated names\) ---\nsample  1: [a-z]*\n"
        self.assertRegex(out, f"^{head}({loss}){{3}}{tail}$")

    def test_every_flag_changes_the_run(self):
        always = "--steps 6 --samples 2 --val-fraction 0.2 --div-warn 1e9"
        runs = [self.printed(f"{always} {flags}") for flags in (
            "", "--stream --context 8", "--merges 1", "--n-layer 2", "--n-embd 8", "--n-head 2",
            "--block-size 4", "--arch gpt2", "--steps 5", "--batch-size 2", "--optimizer sgd", "--lr 0.1",
            "--optimizer momentum", "--optimizer rmsprop", "--optimizer adamw --weight-decay 0.5",
            "--beta1 0.1", "--beta2 0.1", "--eps 0.1", "--cosine", "--schedule constant", "--seed 7",
            "--warmup-steps 3", "--clip-grad 0.1", "--val-fraction 0.4", "--eval-every 4", "--gen-every 4",
            "--temperature 2", "--top-k 2", "--prompt m", "--max-tokens 3", "--samples 3")]
        self.assertEqual(len(set(runs)), len(runs))
        same = "--seed 42", "--clip-grad 0.1 --no-clip-grad", "--cosine --schedule linear", "--weight-decay 9"
        self.assertEqual({self.printed(f"{always} {flags}") for flags in same}, {runs[0]})

    def test_the_long_line_of_the_design_and_going_on(self):
        flags = "--stream --steps 6 --vocab-size 1000 --warmup-steps 3 --cosine --div-crit 50 --gen-every 3"
        for flags, steps in (flags, "123456"), ("--resume run --steps 9", "789"):
            status, out, errors = self.main(f"{flags} --samples 1 --save run")
            self.assertEqual((status, re.findall(r"step +(\d) / +\d \| loss \S+\r", out)), (0, list(steps)))
            self.assertEqual(errors, "")
            self.assertRegex(out, rf"step +{steps[-1]} / +\d \| loss \S+ on average \| validation ")
            self.assertRegex(out, rf"\nsample at step {steps[-1]}: (?s:.)*--- inference .* text\) ---\nsam")

    def test_help_names_every_group_and_default(self):
        status, out, errors = self.script("--help", env={"COLUMNS": "300"})
        self.assertEqual((status, errors), (0, ""))
        for group in ("basics", "model", "training", "watching", "keeping", "sampling", "engine"):
            self.assertIn(f"\n{group}:\n", out)
        self.assertNotRegex(out, "object at|None|%%")
        out = re.sub(r"\n {9,}", "  ", out)  # what stands below a long flag
        told = dict(re.findall(r"^  --([a-z0-9-]+).*?  +[^-].* \(([^()]*)\)$", out, re.M))
        del told["worker-counts"]  # that depends on the machine
        self.assertEqual({name: told.pop(name) for name in NO_FLAGS}, NO_FLAGS)
        self.printed("--steps 1000 --samples 0 --d-model 4 --context 2 --save run")
        kept = {flag.split("=")[0][2:] for flag in self.metadata()["flags"]}  # all that have a default
        self.assertEqual(kept, {*told, "corpus", "prompt", "div-warn"})
        flags = " ".join(f"--{name} {value}" for name, value in told.items())
        self.printed(f"{flags} --samples 0 --d-model 4 --context 2 --save same")
        self.assertEqual(self.content("run"), self.content("same"))

    def test_what_is_refused(self):
        self.printed("--steps 3 --samples 0 --vocab-size 9 --val-fraction 0.2 --div-warn 1e9 --save run")
        for name in ("base", "r.svg", "r.jsonl"):
            shutil.copy("run", name)
        for name, content in {"empty.txt": "", "blank.txt": "\n  \n\r\n\t\n", "latin.txt": b"caf\xe9\n",
                              "short.txt": "ab", "5.txt": "abcde", "other.txt": "aéabcdefghij" * 9,
                              "wide.txt": "ab".encode("utf-16-le"), "text.svg": "<html>",
                              "text.jsonl": "a text"}.items():
            self.file(name, content)
        microgpt.write_safetensors("of-another.safetensors", {"w": [[1.0]]}, {})
        os.makedirs("folder.svg")
        refusals = list(REFUSALS)
        if os.name == "posix":
            refusals += POSIX_REFUSALS
            os.symlink("other.txt", "link.txt")
            os.mkfifo("pipe")
            os.mkfifo("pipe.jsonl")
        files = lambda: {name: os.path.isfile(name) and self.content(name) for name in os.listdir()}
        before = files()
        for status, pattern, flags in refusals:
            with self.subTest(flags[:60]):
                self.assertRefused(status, pattern, "", *flags.split(" "))
        with unittest.mock.patch("os.access", lambda path, mode: False):
            for flags in (AGAIN, "--plot a.svg", "--save new"):
                self.assertRefused(2, "writable folder", flags)
        self.assertEqual(files(), before)
        error = "microgpt: error: --heads 3 does not divide --d-model 16\n"
        self.assertEqual(self.script("--heads 3"), (2, "", error))
        _, _, error = self.script("--prompt ☃", env={"PYTHONIOENCODING": "ascii"})  # which cannot show it
        self.assertEqual((error[:16], error.count("\n")), ("microgpt: error:", 1))

    def test_what_ends_a_run(self):
        for pattern, flags in (("at step [23], .* overflowed", "--lr 1e300"),
                               ("overflowed", "--lr 1e308 --steps 1"),
                               ("overflowed", "--lr 1e308 --steps 1 --samples 0 --explain emma")):
            self.assertSays(1, f"error: .*{pattern}", flags)

    @needs_posix
    def test_memory_does_not_grow_with_the_steps(self):
        driver = self.driver("import resource\nstatus = microgpt.main(sys.argv[1:])\n"
                             "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n")
        flags = "--engine scalar --d-model 4 --context 8 --samples 0 --steps"
        few, many = (int(self.script(flags, n, script=driver)[1].split()[-1]) for n in ("20", "150"))
        self.assertLess(many / few, 2)

class Plain:
    """A standard output like IDLE's or a notebook's: it can write and flush, and nothing else."""
    def __init__(self):
        self.text, self.flushed, self.late = "", 0, False

    def write(self, text):
        self.late = self.late or self.text.endswith(("\r", "\n")) and self.flushed < len(self.text)
        self.text += text

    def flush(self):
        self.flushed = len(self.text)

class TestNotebook(Test):
    """The program as a call or a cell, where the process goes on."""
    def setUp(self):
        super().setUp()
        code, self.names = compile(read(SCRIPT), "cell", "exec"), {"__name__": "__main__"}  # and no __file__
        self.paste = lambda: exec(code, self.names)
        self.rerun = lambda: runpy.run_path(SCRIPT, run_name="__main__")

    def state(self):
        return [gc.isenabled(), *map(signal.getsignal, STOPS), threading.enumerate(),
                multiprocessing.active_children(), sys.stdout, sys.stderr, list(tape)]

    def cell(self, run, flags=""):
        """Call run() as a notebook does. Returns its exit status (None if it just ended) and its output."""
        out, errors, before, status = Plain(), Plain(), self.state(), None
        process, ends = os.getpid(), os._exit  # workers may end
        end = lambda code: self.fail("it ends the process") if os.getpid() == process else ends(code)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), \
             unittest.mock.patch("sys.argv", [SCRIPT, *flags.split()]), unittest.mock.patch("os._exit", end):
            try:
                run()
            except SystemExit as error:
                status = error.code
        self.assertEqual((self.state(), out.late), (before, False))  # no line waits in a buffer
        return status, out.text, errors.text

    def test_it_runs_as_on_a_command_line_and_the_process_lives_on(self):
        flags = "--steps 3 --samples 2"
        self.assertEqual(self.cell(self.rerun, flags), (None, self.printed(flags), ""))
        if hasattr(os, "fork"):
            status, out, errors = self.cell(self.rerun, f"{flags} --workers 2 --batch-size 2")
            self.assertEqual((status, errors, out.count("\r")), (None, "", 3))
        self.file("input.txt", "ab\nba\n")
        wanted = (None, self.printed(), "")
        self.assertEqual(self.cell(self.paste, "-f kernel.json"), wanted)  # which are not its flags
        self.assertEqual(self.cell(lambda: self.assertEqual(self.names["main"](), 0), "-f x"), wanted)
        with ThreadPoolExecutor(1) as pool:  # where no handler can be set
            pool.submit(int).result()
            self.assertEqual(self.cell(lambda: pool.submit(self.paste).result()), wanted)

    def test_an_error_ends_the_cell_and_not_the_process(self):
        line = "microgpt: error: --heads 3 does not divide --d-model 16\n"
        self.assertEqual(self.cell(self.rerun, "--heads 3"), (2, "", line))
        os.remove("input.txt")
        status, out, errors = self.cell(self.paste)
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(errors, r"^microgpt: error: cannot read [^\n]*input\.txt: No such file [^\n]*\n$")

    def test_a_session_in_a_terminal_keeps_its_ctrl_c(self):
        code = ("import runpy, signal, sys\nsys.argv = ['', '--heads', '3']\n"
                f"try: runpy.run_path({SCRIPT!r}, run_name='__main__')\nexcept SystemExit: pass\n"
                "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
        got = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(got.stdout.split(), [b"True"], got.stderr)

    def test_a_window_of_idle_gets_lines_and_no_codes(self):
        with unittest.mock.patch.dict(sys.modules, idlelib=types.ModuleType("idlelib")):
            _, out, _ = self.cell(self.rerun, "--steps 30 --samples 1 --val-fraction 0.1")
        self.assertNotRegex(out, "[\r\x1b]")
        self.assertEqual(len(re.findall(r"^step +\d+ / +30 \| loss \d\.\d{4}$", out, re.M)), 30)

    def test_main_leaves_the_process_as_it_was(self):
        before = self.state()
        with ThreadPoolExecutor(1) as pool:  # any thread will do
            got = pool.submit(self.main, "--steps 2 --samples 1").result()
        self.assertEqual(got, (0, self.printed("--steps 2 --samples 1"), ""))
        self.interrupted("--steps 9 --save run", 3)
        self.assertEqual(self.state(), before)
        gc.disable()
        self.assertEqual((self.main("--heads 3")[0], gc.isenabled()), (2, False))

@needs_posix
class TestTerminal(Test):
    def on_terminal(self, flags, columns):
        """Start a run on a terminal of so many columns. Returns the process, and the terminal's other end."""
        import fcntl, termios
        terminal, end = os.openpty()
        self.addCleanup(os.close, terminal)
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {"COLUMNS": None, "PYTHONUNBUFFERED": None}
        process = self.start(flags, stdout=end, stderr=end, stdin=end, env=env)
        os.close(end)
        return process, terminal

    def shown(self, terminal):
        """What is shown until the end."""
        shown = b""
        with contextlib.suppress(OSError):  # nobody is at the other end any more
            while more := os.read(terminal, 10000):
                shown += more
        return shown.decode().replace("\r\n", "\n")

    def test_the_rate_and_the_time_left_are_those_of_the_steps_made(self):
        run, out = types.SimpleNamespace(step=5, args=types.SimpleNamespace(steps=26)), io.StringIO()
        with contextlib.redirect_stdout(out), unittest.mock.patch.multiple(
                microgpt, on_terminal=lambda: True, columns=lambda: 99, time=unittest.mock.Mock()):
            microgpt.time.perf_counter.return_value = 15.0  # after steps 3 to 6, which began at 7.0
            microgpt.show_progress(run, 2.5, 2, 7.0)
        told = "step    6 /   26 | loss 2.5000 | 0.5 steps/s, 0:00:40 of 0:00:48 left"
        self.assertEqual(out.getvalue().rstrip(), told)

    def test_a_terminal_shows_the_rate_and_what_ctrl_c_does(self):
        process, terminal = self.on_terminal("--steps 1000000", 100)
        shown = b""
        while shown.count(b"| loss") < 9:
            shown += os.read(terminal, 10000)
        process.send_signal(signal.SIGINT)
        lines = re.split("[\r\n]+", shown.decode() + self.shown(terminal))
        self.assertEqual(process.wait(), 130)
        self.assertRegex(lines[8], r"^step +\d+ / 1000000 \| loss \d\.\d{4} \| \S+ steps/s, .* left *$")
        self.assertIn("microgpt: finishing this step; interrupt again to stop without saving", lines)
        self.assertIn("microgpt: interrupted; nothing was saved", lines)

    def test_narrow_terminals_get_one_line_without_codes(self):
        for columns, flags, told in ((40, "", 0), (100, "--arch gpt2", 0),
                                     (60, "--val-fraction 0.2 --eval-every 20 --div-warn 1e9", 2)):
            process, terminal = self.on_terminal(f"--steps 40 --samples 2 {flags}", columns)
            shown = self.shown(terminal)
            self.assertEqual((process.wait(), "\x1b" in shown), (0, False))
            progress = re.findall(r"([^\r\n]*)\r", shown)
            self.assertEqual((len(progress), {*map(len, progress)}), (40, {columns - 1}))
            self.assertTrue(all(re.match(r"step +\d+ / +40 \| loss \d\.\d{4}", text) for text in progress))
            self.assertTrue(columns < 70 or " steps/s, " in progress[-1], progress[-1])
            averages = r"^(?:.*\r)?step +\d+ .* on average \| validation \d\.\d{4} *$"
            self.assertEqual(len(re.findall(averages, shown, re.M)), told, shown[-500:])

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
# The tests are the quick ones. To check all of it takes long: python test_microgpt.py readme

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
    3: ([('w["wte"].embed(ids) + w["wpe"].embed(positions)            #', 'w["wte"].embed(ids)  #')],
        ["", "--steps 4000 --eval-every 4000"]),
    4: ([], ["--temperature 0.1", "--temperature 2"]),
    5: ([], ["--optimizer sgd", "--optimizer sgd --lr 0.3", "--optimizer sgd --lr 1"]),
    6: ([], ["--val-fraction 0.99 --eval-every 4000 --steps 4000"]),
    7: ([("rng.shuffle(docs)\n    return", "docs.sort()\n    return")], [""]),
    8: ([("rng.gauss(0, 0.08)", "rng.gauss(0, 0.0)")], [""]),
    9: ([("probabilities(row[: len(row) - n]) + [0.0] * n", "probabilities(row)")], [""]),
}

MISTAKES = [  # each of the porting section, in its order: what of part one is replaced, and by what
    [("for q_row, k_row, v_row, position in zip(self.rows, k.rows, v.rows, positions):\n"
      "            cache.append((k_row, v_row))\n            seen = cache[-1 - position :]",
      "cache += zip(k.rows, v.rows)\n        for q_row in self.rows:\n            seen = cache")],
    [("normed = x.rmsnorm()", "normed = x")],
    [("hidden = x.rmsnorm()", "hidden = x")],
    [('x.linear(w["lm_head"])', 'x.rmsnorm().linear(w["lm_head"])')],
    [("    x = x.rmsnorm()", "    x = x")],
    [("x = x + found", "x = normed + found")],
    [(" / math.sqrt(len(query)) for key in keys", " for key in keys")],
    [("n_head: int = 4", "n_head: int = 1")],
    [("[key[head] for", "[key[start // size :: n_head] for"),
     ("q_row[head]", "q_row[start // size :: n_head]")],
    [("q.attention(k, v,", "k.attention(q, v,")],
    [("add_up(losses) / len(losses)", "add_up(losses) / 16")],
    [("add_up(losses) / len(losses)", "add_up(losses)")],
    [("tokenizer.encode(doc) + [tokenizer.bos]", "tokenizer.encode(doc)")],
    [("beta1 ** (step + 1)", "beta1 ** (step + 2)"), ("beta2 ** (step + 1)", "beta2 ** (step + 2)")],
    [("grad += slope", "grad = slope")],
    [("(other.data, self.data))", "(other.data, 0.0 if self is other else self.data))")],
    [("(1.0 if self.data > 0 else 0.0,)", "(1.0,)")],
    [("        adam(weights, grads,",
      "        total = grads if step == 0 else {name: [[a + b for a, b in zip(x, y)] "
      "for x, y in zip(total[name], rows)] for name, rows in grads.items()}\n        adam(weights, total,")],
]

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

    def assertTold(self, wanted):
        """The numbers are in the porting section, outside of what describes the generator."""
        text = re.sub("`[^`]*`", "", self.section("Porting").split("Python's random generator")[0])
        told = [float(n.replace(",", "")) for n in re.findall(r"-?\d+\.\d{7,}|\d\d,\d{3}", text)]
        for i, number in enumerate(wanted):
            self.assertAlmostEqual(min(told, key=lambda each: abs(each - number)), number, 12, i)

    def first_losses(self, source, n):
        """The first n losses of the default run, by such a part one."""
        port, out = types.ModuleType("port"), []
        short = [("in range(steps)", f"in range({n})"), ("in range(20)", "in ()")]
        with unittest.mock.patch.dict(sys.modules, port=port):  # where dataclasses look for it
            exec(self.edited(short, source), vars(port))
        mean_loss = port.mean_loss
        port.mean_loss = lambda *args: out.append(mean_loss(*args)) or out[-1]
        with contextlib.redirect_stdout(io.StringIO()):
            port.train_and_sample()
        return [loss.data for loss in out]

    def test_every_command_is_one(self):
        commands = list(readme_commands())
        self.assertGreater(len(commands), 9)
        for flags, _ in commands:
            if "--help" not in flags:
                self.assertRefused(2, "arguments: --nonsense; see --help$", "--nonsense", *flags)

    def test_the_code_on_the_first_screen_is_that_of_the_file(self):
        code = self.section("What you see").split("```python\n")[1].split("\n```")[0]
        for piece in code.split("\n\n"):
            self.assertIn(piece + "\n", self.source)

    def test_the_library_snippets_run(self):
        blocks = re.findall(r"```python\n(.*?)```", self.section("As a library"), re.S)
        self.assertEqual(len(blocks), 2)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for block in blocks:
                exec(block, {})
        self.assertRegex(out.getvalue()[-999:], r"(?s)loss .*\n0\.\d+\n\['a.*'\]\n\d\.\d+\nso")
        self.assertTrue(os.path.exists("names.safetensors"))

    def test_the_snippets_name_the_matrices_that_there_are(self):
        table, *snippets = self.section("Taking the weights elsewhere").split("```python\n")
        for snippet in snippets:
            compile(snippet.split("```")[0], "README.md", "exec")
        named = set(re.findall(r"[`.]((?:ln|attn|mlp|lm|w[tp])\w+)`", table))
        for kind in (GPT, GPT2):
            names = {name.replace("layer0.", "").split(".")[0] for name in kind(27).shapes()}
            self.assertLessEqual(names, named)

    def test_the_first_numbers_for_porting(self):
        a, b = Value(2.0), Value(-3.0)
        y = ((a * b + a**2).exp() + 1).log() / b
        y.backward()
        rng, docs = random.Random(42), SHIPPED[:]
        rng.shuffle(docs)
        tokenizer, model = CharTokenizer(docs), GPT(27)
        batch = [[26, *tokenizer.encode(doc), 26][:17] for doc in docs[:10]]
        weights = model.initial_weights(rng)
        w = {name: Matrix.wrap(rows) for name, rows in weights.items()}
        microgpt.mean_loss(model, w, batch[:1])
        told = [y.data, a.grad, b.grad, len(tape)]
        told.append(microgpt.loss_and_grads(model, weights, batch[:3])[0])
        m, v = microgpt.zeros(weights), microgpt.zeros(weights)
        for step in range(10):
            loss, grads = microgpt.loss_and_grads(model, weights, [batch[step]], FastTensor)
            microgpt.adam(weights, grads, m, v, step, 0.01 * (1 - step / 1000))
            if step in (0, 1, 2, 9):
                told += [loss, math.sqrt(sum(g * g for g in flat(grads)))][: 1 + (step == 0)]
        self.assertTold(told)

    def check_a_mistake_in_a_port_shows_as_it_is_told(self):
        table = re.findall(r"\| (\d) \| (\d+\.\d+) \| [^|]+ (?=\|)", self.section("Porting"))
        self.assertEqual(len(table), len(MISTAKES))
        part_one = self.source[: self.source.index("# PART TWO")]
        right = self.first_losses(part_one, 3)
        for (step, told), edits in zip(table, MISTAKES):
            *before, loss = self.first_losses(self.edited(edits, part_one), int(step))
            self.assertEqual(f"{loss:.{len(told.partition('.')[2])}f}", told, edits)
            self.assertEqual(before, right[: len(before)], edits)

    def test_the_exercises_fit_the_source(self):
        items = re.findall(r"^\| \d \| .*", self.section("Exercises"), re.M)
        self.assertEqual(len(items), len(EXERCISES))
        for item, (edits, runs) in zip(items, EXERCISES.values()):
            self.file("microgpt.py", self.edited(edits, self.source))
            for _, new in edits:
                self.assertIn(re.split("\n|  #", new)[0], item)
            short = "--steps 2 --val-fraction 0.001 --div-warn 1e9 --samples 1 --batch-size 1"
            self.run_command(*runs[-1].split(), *short.split())

    def check_the_numbers_for_porting(self):
        lines = self.run_command(*"--explain emma --samples 5 --trace run.jsonl --save run".split())
        for line in self.section("What you see").split("```\n")[1].splitlines():
            self.assertIn(line, lines)
        explained = next(shown for flags, shown in readme_commands() if "--explain" in flags)
        self.assertEqual(explained, lines[-len(explained) :])
        told, porting = [self.trace()[-1]["loss"]], self.section("Porting")
        for flags in ("--batch-size 3", "--arch gpt2"):
            self.run_command(*flags.split(), *"--steps 1 --trace other.jsonl".split())
            told.append(self.trace("other.jsonl")[0]["loss"])
        self.assertTold(told)
        samples = [line.split(": ")[1] for line in lines if line.startswith("sample")]
        self.assertIn("{}, {}, {}, {} and {}".format(*samples), porting.replace(", and", " and"))
        greedy = re.findall(r"^\| `(--temperature 0.*?)` \| .*each sample: (\w+)", porting, re.M)
        for more, (flags, name) in zip(("--resume run --steps 0", ""), greedy):
            got = self.run_command(*f"{flags} {more} --samples 1".split())
            self.assertIn(f"sample  1: {name}", got)
        self.assertEqual(len(greedy), 2)

    def check_the_generator_for_porting(self):
        porting, rng = " ".join(self.section("Porting").split()), random.Random(42)
        rng.shuffle(SHIPPED[:])
        GPT(27).initial_weights(rng)
        self.assertIn(f"{rng.getstate()[1][-1]} after the weights", porting)
        after = [rng.getrandbits(32) for _ in range(490)]
        u, v = (((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in (after[:2], after[488:]))
        for number in (*after[:3], u, *after[487:], v):
            self.assertIn(str(number), porting)

    def check_every_command_and_exercise(self):
        """Run them in full, and print what the README does not say."""
        self.timeout, numbers = 3600, " ".join(self.section("Exercises").split())
        self.file("more.txt", "\n".join(SHIPPED[:60]))
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

WINDOWS = "--layers 2 --d-model 64 --context 64 --stream --batch-size 8"

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
    return lambda: seconds(lambda: learn(docs, 500, new))

BENCHMARKS = [  # what, against what, rounds, and what makes the two functions that time them
    ("a step", "the reference", 5, lambda: (step(), yardstick())),
    ("a step, `--engine scalar`", "the reference", 5, lambda: (step("--engine scalar", 20), yardstick())),
    ("a sampled token", "`--engine scalar`", 5, lambda: (token("tensor", 400), token("scalar", 40))),
    ("a step of 8 windows of 64, 2 layers of 64, `--workers 2`", "one process", 5,
     lambda: [step(f"{WINDOWS} --workers {n}", 2) for n in (2, 1)]),
    ("the same in one process with layers of 128, `--vulkan`", "plain Python", 3,
     lambda: [step(f"{WINDOWS} --d-model 128 --engine {name}", 1) for name in ("vulkan", "tensor")]),
    ("500 merges of 200 kB", "`learn_merges_slowly`", 3,
     lambda: [merges(learn) for learn in (microgpt.learn_merges, microgpt.learn_merges_slowly)]),
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
        checks = [TestReadme(name) for name in dir(TestReadme) if name.startswith(("check_", "test_"))]
        sys.exit(not unittest.TextTestRunner().run(unittest.TestSuite(checks)).wasSuccessful())
    else:
        unittest.main(warnings="ignore")  # such as those of forks beside threads
