#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A GPT in one file of pure Python, made to be read from top to bottom.

    python microgpt.py            learn the names in input.txt, then invent new ones
    python microgpt.py --help     everything else that it can do

A text is cut into tokens, here its characters. A GPT (generative pretrained transformer) is a function from the
tokens so far to a probability for each token that may come next, and training is the search for the numbers inside
it that make its guesses good. This file holds all of that and needs nothing but Python. It has three parts, and
each is a place to stop:

    Part one    the complete algorithm, one number at a time               sections 1 to 8
    Part two    the same, much faster: matrices, subwords, GPU, cores      sections 9 to 12
    Part three  a tool for every day                                       sections 13 to 17

Given the same input.txt and no flags, it draws the same random numbers and prints the same figures as microgpt by
Andrej Karpathy, below called the reference.
"""
import argparse
import atexit
import gc
import glob
import json
import math
import os
import random
import signal
import struct
import sys
import threading
import time
from array import array
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from html import escape
from itertools import accumulate, chain, count, islice, product, repeat, takewhile
from operator import add as plus, mul
from queue import Empty, SimpleQueue
from textwrap import wrap

class UserError(ValueError):
    """What a person did wrong and can put right. The command line prints it as one line."""

    status = 1

class Halt(UserError):
    """What ends a run whose weights are good: they are saved first."""


# ==========================================================================================================
# PART ONE: THE COMPLETE ALGORITHM
# ==========================================================================================================

# 1. Dataset -----------------------------------------------------------------------------------------------
#
# A language model learns from documents: here names, but they may be lines of verse or moves of chess. A
# document is a string, and a text file holds one per line. A stream is a single long document, a book say.

def read_documents(paths, stream=False):
    """The documents in UTF-8 files: one per line that is not blank, stripped; or, as a stream, all text as one."""
    docs = []
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as file:  # -sig: a byte-order mark is no part of the text
                docs += [file.read()] if stream else filter(None, map(str.strip, file))
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text: convert it first") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return ["".join(docs)] if stream else docs


# 2. Characters --------------------------------------------------------------------------------------------
#
# The model computes with numbers, so every different token has one, its id. The tokens are characters, and
# their ids 0, 1, 2, ... follow their sorted order. One more id, BOS ("beginning of sequence"), marks both ends
# of a document: from it the model learns how names begin, and when to stop.

class CharTokenizer:
    """A token for each different character of the documents, and BOS as the last id."""

    merges = ()

    def __init__(self, docs):
        self.tokens = sorted(set().union(*docs))
        self.ids = {char: i for i, char in enumerate(self.tokens)}
        self.bos = len(self.tokens)
        self.vocab_size = len(self.tokens) + 1

    def encode(self, text):
        """The ids of a text. Raises a UserError that names a character the documents lacked."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            raise UserError(f"no document has the character {error}, so the model cannot know it") from None

    def decode(self, ids):
        """The text of some ids. BOS stands for none."""
        return "".join(self.tokens[i] for i in ids if i != self.bos)


# 3. Autograd on one number --------------------------------------------------------------------------------
#
# The loss is one number that says how wrong the model is. Its derivative with respect to some number is called
# that number's gradient: it tells which way to change the number. Autograd finds all gradients: each operation
# knows its slopes, the derivatives with respect to its inputs. c = a * b changes b times as fast as a, and a
# times as fast as b. By the chain rule slopes multiply along a path from a number to the loss, and the products
# of all paths add up. So the result of every operation goes on a list, the tape, and backward() reads it from the
# end: all that was computed from a Value comes later on the tape, so its gradient is complete before it is passed
# on.

tape = []  # the results of all operations, in the order in which they were computed
recording = True  # or not, in no_grad(): sampling, for one, needs no gradients

@contextmanager
def no_grad():
    """In this block operations compute, but nothing is recorded."""
    global recording
    before, recording = recording, False
    try:
        yield
    finally:
        recording = before

def backward(loss):
    """Add to the grad of every number behind the loss the derivative of the loss by it; empty the tape."""
    loss.grad = 1.0
    while tape:
        tape.pop().backprop()

class Value:
    """A number, data, and its gradient, grad; the Values a and b that it came from, and the slopes da, db."""

    __slots__ = "data", "grad", "a", "da", "b", "db"

    def __init__(self, data, a=None, da=0.0, b=None, db=0.0):
        self.data = data
        self.grad = 0.0
        if a is not None and recording:
            self.a, self.da, self.b, self.db = a, da, b, db
            tape.append(self)

    def backprop(self):
        """One step of the chain rule."""
        self.a.grad += self.da * self.grad
        if self.b is not None:
            self.b.grad += self.db * self.grad

    def __add__(self, other):
        if isinstance(other, Value):
            return Value(self.data + other.data, self, 1.0, other, 1.0)
        return Value(self.data + other, self, 1.0)

    def __sub__(self, other):
        if isinstance(other, Value):
            return Value(self.data - other.data, self, 1.0, other, -1.0)
        return Value(self.data - other, self, 1.0)

    def __mul__(self, other):
        if isinstance(other, Value):
            return Value(self.data * other.data, self, other.data, other, self.data)
        return Value(self.data * other, self, other)

    def __truediv__(self, other):
        if isinstance(other, Value):
            return Value(self.data / other.data, self, 1 / other.data, other, -self.data / other.data**2)
        return Value(self.data / other, self, 1 / other)

    __radd__, __rmul__ = __add__, __mul__
    def __rsub__(self, other): return Value(other - self.data, self, -1.0)
    def __rtruediv__(self, other): return Value(other / self.data, self, -other / self.data**2)
    def __pow__(self, k): return Value(self.data**k, self, k * self.data ** (k - 1))  # k is a plain number
    def __neg__(self): return Value(-self.data, self, -1.0)
    def relu(self): return Value(max(0.0, self.data), self, float(self.data > 0))
    def log(self): return Value(math.log(self.data), self, 1 / self.data)

    def exp(self):
        e = math.exp(self.data)
        return Value(e, self, e)

    def tanh(self):
        t = math.tanh(self.data)
        return Value(t, self, 1 - t * t)


# 4. The operations of a GPT, spelled out in Values --------------------------------------------------------
#
# A GPT needs no more than these. The numbers that training changes are its weights, or parameters. x is a list of
# rows, one for each position in the text, and the numbers in a row are its channels: x[position][channel]. All
# operations but attention treat each row by itself; attention is how the past gets into the present.

class Scalar:
    """The engine that computes with Values: slow, plain, and the definition of what a faster one must do. A
    class only as a box of functions: they take no self, and section 9 has another box with the same names."""

    def wrap(weights):
        """Weights as Values, with gradients of 0."""
        return {name: [list(map(Value, row)) for row in rows] for name, rows in weights.items()}

    def grads(w):
        """The gradients of wrapped weights, as rows of floats."""
        return {name: [[p.grad for p in row] for row in rows] for name, rows in w.items()}

    def floats(x):
        """The numbers in x, as rows of floats."""
        return [[a.data for a in row] for row in x]

    def embed(table, ids):
        """Each id's row in a table of embeddings: the learned numbers that stand for a token or a position."""
        return [table[i] for i in ids]

    def add(x, z):
        return [[a + b for a, b in zip(*rows)] for rows in zip(x, z)]

    def linear(x, w, bias=None):
        """A linear layer: in each position y = W x + b. Every output is a weighted sum of all inputs, plus a
        number of its own, the bias, if there is one. Weights are w[output][input]."""
        y = [[sum(map(mul, weights, row)) for weights in w] for row in x]
        return Scalar.add(y, repeat(bias[0])) if bias else y

    def rmsnorm(x):
        """Normalization: each row over its root mean square, so that all have one size. 1e-5 is there so as never
        to divide by 0. (Zhang, Sennrich 2019)"""
        scales = [(sum(a * a for a in row) / len(row) + 1e-5) ** -0.5 for row in x]
        return [[a * scale for a in row] for row, scale in zip(x, scales)]

    def layernorm(x, gain, bias):
        """GPT-2's normalization: the mean taken off, rmsnorm, then for each channel a learned factor, the gain,
        and a bias. (Ba, Kiros, Hinton 2016)"""
        means = [sum(row) / len(row) for row in x]
        rows = Scalar.rmsnorm([[a - mean for a in row] for row, mean in zip(x, means)])
        return [[a * g + b for a, g, b in zip(row, gain[0], bias[0])] for row in rows]

    def relu(x):
        """max(0, a), the activation. Without a bend like this many linear layers would be no more than one."""
        return [[a.relu() for a in row] for row in x]

    def gelu(x):
        """GPT-2's activation, a relu with a soft knee, by its tanh formula. (Hendrycks, Gimpel 2016)"""
        c = math.sqrt(2 / math.pi)
        return [[a * ((c * (a + 0.044715 * a * a * a)).tanh() + 1) / 2 for a in row] for row in x]

    def softmax(row):
        """e^a over the sum of all e^a: probabilities, positive and summing to 1."""
        top = max(a.data for a in row)  # subtracting it changes no probability, and no e^a can overflow
        exps = [(a - top).exp() for a in row]
        total = sum(exps)
        return [e / total for e in exps]

    def attention(q, k, v, lengths, caches, n_head):
        """Each position has a query (what it looks for), a key (what it can be found by) and a value (what it
        hands on). The dot product of query and key is a score, over sqrt(size) lest it grow with the size; the
        softmax of the scores says what share of each value to take. A document's cache holds its keys and values
        so far: a position adds its own, then asks, so none sees the future. Each head does this on `size` channels
        of its own, so that a position can look for several things at once. `lengths` says how many rows each
        document has. (Vaswani et al. 2017)"""
        size, out = len(q[0]) // n_head, []
        for length, (keys, values) in zip(lengths, caches):
            for t in range(len(out), len(out) + length):
                keys.append(k[t])
                values.append(v[t])
                out.append([])
                for start in range(0, len(q[t]), size):
                    head = slice(start, start + size)
                    scores = [sum(map(mul, q[t][head], key[head])) / size**0.5 for key in keys]
                    shares = Scalar.softmax(scores)
                    channels = zip(*[value[head] for value in values])
                    out[-1] += [sum(map(mul, shares, channel)) for channel in channels]
        return out

    def cross_entropy(logits, targets):
        """The loss: -log p of the token that really came next, on average. The logits are the scores of all
        tokens, and p is their softmax, so -log p = log(sum of all e^a) - a[target]. It is 0 if the model is sure
        and right, log(vocab_size) if all tokens are the same to it."""
        tops = [max(a.data for a in row) for row in logits]
        logs = [sum((a - top).exp() for a in row).log() + top for row, top in zip(logits, tops)]
        return sum(log - row[target] for log, row, target in zip(logs, logits, targets)) / len(targets)


# 5. GPT ---------------------------------------------------------------------------------------------------
#
# The weights are a dictionary from names to rows of floats. A token and its position have an embedding each, and
# the sum of both is a row of n_embd channels. Each layer changes it twice, each time by adding something computed
# from its normalized copy. (This is the residual connection: x + f(x) has a slope of 1 from x, so gradients reach
# the first layer undiminished.) Attention adds what it found in other positions; the MLP (multilayer perceptron),
# two linear operations with an activation between them, works on each position alone. A last one, lm_head, turns
# each row into logits: a score for each token that may come next.

@dataclass(frozen=True)
class Config:
    """The shape of a model. Raises a UserError if there is no such model."""

    vocab_size: int
    n_layer: int = 1
    n_embd: int = 16
    n_head: int = 4
    block_size: int = 16  # the most positions that it can see
    arch: str = "microgpt"

    def __post_init__(self):
        if min(self.vocab_size, self.n_layer, self.n_embd, self.n_head, self.block_size) < 1:
            raise UserError(f"all sizes must be at least 1: {self}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")
        if self.arch not in ("microgpt", "gpt2"):
            raise UserError(f"arch must be microgpt or gpt2, not {self.arch}")

def shapes(config):
    """Name -> (rows, columns) of each weight matrix, in the order in which they are drawn: the embeddings of
    tokens and positions, lm_head, then of each layer query, key, value, output and the two layers of the MLP. The
    arch gpt2 has a bias for each linear layer, and a gain and a bias for each norm, as rows."""
    d, layers = config.n_embd, [f"layer{i}." for i in range(config.n_layer)]
    out = {"wte": (config.vocab_size, d), "wpe": (config.block_size, d), "lm_head": (config.vocab_size, d)}
    for layer in layers:
        out.update({layer + name: (d, d) for name in ("attn_wq", "attn_wk", "attn_wv", "attn_wo")})
        out.update({layer + "mlp_fc1": (4 * d, d), layer + "mlp_fc2": (d, 4 * d)})
    if config.arch == "gpt2":
        linear = {name + ".bias": (1, out[name][0]) for name in out if name not in ("wte", "wpe")}
        norms = [layer + name for layer in layers for name in ("ln1", "ln2")] + ["ln_f"]
        out.update({name + part: (1, d) for name in norms for part in ("", ".bias")}, **linear)
    return out

def initial_weights(config, rng):
    """Matrices drawn from a normal distribution of mean 0 and deviation 0.08; gains of 1 and biases of 0."""
    def row(name, width):
        if name.endswith((".bias", "ln1", "ln2", "ln_f")):
            return [0.0 if name.endswith(".bias") else 1.0] * width
        return [rng.gauss(0, 0.08) for _ in range(width)]

    return {name: [row(name, width) for _ in range(rows)] for name, (rows, width) in shapes(config).items()}

def new_cache(config):
    """What a model remembers of one document: for each layer the keys and the values so far."""
    return [([], []) for _ in range(config.n_layer)]

def gpt(engine, config, w, docs, caches):
    """The logits after each of the next tokens of some documents, x[position][token id], one document after the
    other; each goes on where its cache ends. Training passes whole documents with new caches; sampling passes a
    prompt, the text to go on from, then a token at a time."""
    def linear(x, name):
        return engine.linear(x, w[name], w.get(name + ".bias"))

    def norm(x, name):
        return engine.layernorm(x, w[name], w[name + ".bias"]) if name in w else engine.rmsnorm(x)

    starts, lengths = [len(cache[0][0]) for cache in caches], [len(doc) for doc in docs]
    positions = [start + i for start, length in zip(starts, lengths) for i in range(length)]
    x = engine.add(engine.embed(w["wte"], chain(*docs)), engine.embed(w["wpe"], positions))
    x = engine.rmsnorm(x) if config.arch == "microgpt" else x  # the reference norms here, GPT-2 at the end
    activation = engine.relu if config.arch == "microgpt" else engine.gelu
    for i in range(config.n_layer):
        layer = f"layer{i}."
        h = norm(x, layer + "ln1")
        q, k, v = [linear(h, layer + name) for name in ("attn_wq", "attn_wk", "attn_wv")]
        h = engine.attention(q, k, v, lengths, [cache[i] for cache in caches], config.n_head)
        x = engine.add(x, linear(h, layer + "attn_wo"))
        h = activation(linear(norm(x, layer + "ln2"), layer + "mlp_fc1"))
        x = engine.add(x, linear(h, layer + "mlp_fc2"))
    return linear(norm(x, "ln_f") if config.arch == "gpt2" else x, "lm_head")


# 6. Adam --------------------------------------------------------------------------------------------------
#
# The gradient points to where the loss grows, so a step goes the other way; how far, says the learning rate.
# For each weight Adam (Kingma, Ba 2015) keeps two running means, its moments: m of the gradient and v of its
# square. The weight moves by rate * m / sqrt(v): by almost all of the rate while the gradient keeps its sign, and
# hardly at all where it swings to and fro.

def zeros(weights):
    """Rows of zeros in the shape of some weights."""
    return {name: [[0.0] * len(row) for row in rows] for name, rows in weights.items()}

def rows_of(*dictionaries):
    """The rows that belong together in dictionaries of the same shape: of weights, gradients, moments."""
    return chain.from_iterable(zip(*(each[name] for each in dictionaries)) for name in dictionaries[0])

def adam(weights, grads, m, v, step, lr, beta1=0.85, beta2=0.99, eps=1e-8, **_):
    """Move the weights by one step (the first is step 0), and their moments m and v with them, in place."""
    new1, new2, sqrt = 1 - beta1, 1 - beta2, math.sqrt
    # The moments start at 0, too small by a factor of 1 - beta^(step + 1). The paper divides both by it; this is
    # the same.
    short = sqrt(1 - beta2 ** (step + 1))
    rate, eps = lr * short / (1 - beta1 ** (step + 1)), eps * short
    for w, g, mw, vw in rows_of(weights, grads, m, v):
        for i in range(len(w)):
            gi = g[i]
            mw[i] = mi = beta1 * mw[i] + new1 * gi
            vw[i] = vi = beta2 * vw[i] + new2 * gi * gi
            w[i] -= rate * mi / (sqrt(vi) + eps)


# 7. Training ----------------------------------------------------------------------------------------------
#
# Each step takes a few documents, its batch, and has the model guess every next token in them. The tape, read
# from the end, gives each weight its gradient, and Adam moves it. That is all of learning, a thousand times over.
# The learning rate falls in a straight line to 0: bold steps at first, careful ones at last.

def document_batches(docs, encode, bos, block_size, batch_size):
    """A function from a step to its batch: documents step * batch_size and on, wrapping around at the end, each
    between two BOS and cut at block_size + 1 tokens."""
    def batch_at(step):
        picked = [docs[(step * batch_size + i) % len(docs)] for i in range(batch_size)]
        return [[bos, *encode(doc[:block_size]), bos][: block_size + 1] for doc in picked]

    return batch_at

def stream_batches(text, encode, block_size, batch_size, seed):
    """A function from a step to its batch: windows of block_size + 1 tokens from anywhere in a text."""
    if len(text) <= block_size:
        raise UserError(f"a stream of {len(text)} tokens is too short for a context of {block_size}")

    def batch_at(step):
        rng = random.Random(f"{seed} {step}")
        starts = [rng.randrange(len(text) - block_size) for _ in range(batch_size)]
        return [encode(text[start : start + block_size + 1]) for start in starts]

    return batch_at

def batch_loss(engine, config, w, batch):
    """The mean loss over all tokens that a batch predicts: in each of its token lists all but the first."""
    caches = [new_cache(config) for _ in batch]
    logits = gpt(engine, config, w, [tokens[:-1] for tokens in batch], caches)
    return engine.cross_entropy(logits, [token for tokens in batch for token in tokens[1:]])

def loss_and_grads(engine, config, weights, batch):
    """The mean loss of a batch, and the gradient of each weight."""
    w = engine.wrap(weights)
    loss = batch_loss(engine, config, w, batch)
    backward(loss)
    return loss.data, engine.grads(w)

def train(compute, weights, m, v, batch_at, steps, rate_at, optimizer=adam, first=0, **settings):
    """Train the weights and their moments m and v, in place, from step `first` to `steps`. compute is
    loss_and_grads with an engine and a config; batch_at and rate_at give each step its batch and its learning
    rate, in the reference 0.01 * (1 - step / steps). After each step yield its number, from 0, loss,
    gradients and batch."""
    for step in range(first, steps):
        batch = batch_at(step)
        loss, grads = compute(weights, batch)
        optimizer(weights, grads, m, v, step, rate_at(step), **settings)
        yield step, loss, grads, batch


# 8. Sampling ----------------------------------------------------------------------------------------------
#
# Draw a token by the model's probabilities, append it, and so on until BOS. The logits are first divided by the
# temperature: below 1 likely tokens become likelier still, and 0 means always the likeliest. Keys and values of
# the past don't change, so the cache keeps them, and a token costs one position. But positions are learned only up
# to block_size, the window. When it is full it slides: its later half is read anew from position 0, and the rest
# is forgotten, so that a token then costs about two positions. A prompt that is too long is cut to half a window.

def sample(engine, config, weights, prompt, max_tokens, temperature=1.0, top_k=0, rng=random):
    """Yield max_tokens tokens that go on from a prompt of at least one, each drawn from the top_k likeliest and
    their equals (0: from all) at a temperature (0: the likeliest)."""
    w, past, new, cache = engine.wrap(weights), [], list(prompt), new_cache(config)
    for _ in range(max_tokens):
        past += new
        if len(cache[0][0]) + len(new) > config.block_size:
            new, cache = past[-((config.block_size + 1) // 2) :], new_cache(config)
        with no_grad():
            logits = engine.floats(gpt(engine, config, w, [new], [cache]))[-1]
        new = [draw(logits, temperature, top_k, rng)]
        yield new[0]

def draw(logits, temperature, top_k, rng):
    """A token id, drawn by its logits."""
    if not all(map(math.isfinite, logits)):
        raise UserError("the model's numbers have overflowed: train it with a lower --lr")
    top = max(logits)
    if temperature == 0:
        return logits.index(top)
    least = sorted(logits)[-top_k] if 0 < top_k < len(logits) else -math.inf
    odds = [math.exp((a - top) / temperature) if a >= least else 0.0 for a in logits]
    return rng.choices(range(len(odds)), weights=odds)[0]


# ==========================================================================================================
# PART TWO: EFFICIENCY
# ==========================================================================================================

# 9. The same operations, a matrix at a time ---------------------------------------------------------------
#
# Part one makes an object of every multiplication. A Tensor holds a matrix instead, and each operation leaves
# one rule on the same tape: given g, the gradient of its result, pass on the gradients of its inputs. The comment
# above each operation derives its rule, and the tests compare each with its version in Values.
#
# Nearly all the time goes to matrix products, that is to dot products, and there to the interpreter's loop rather
# than to arithmetic. So the loop is written out: for vectors of length 3 Python compiles `a0*b0+a1*b1+a2*b2`,
# once. Long ones go to math.sumprod (from Python 3.12), which loops in C. And behind a relu most numbers are 0, in
# a trained model six of seven: rows that know where they are not save the rest of the work.

sumprod = getattr(math, "sumprod", lambda a, b: sum(map(mul, a, b)))
WRITTEN_OUT = 16 if hasattr(math, "sumprod") else 257  # dot products of fewer terms than this

@lru_cache(maxsize=None)
def dots(n):
    """A function of two lists of vectors of length n: the dot product of each with each."""
    if n >= WRITTEN_OUT:
        return lambda rows, columns: [[sumprod(a, b) for b in columns] for a in rows]
    a, b = [[f"{x}{i}" for i in range(n)] for x in "ab"]
    source = f"""def product(rows, columns):
        out = []
        for {','.join(a)}, in rows:
            row = []
            for {','.join(b)}, in columns:
                row.append({'+'.join(map('{}*{}'.format, a, b))})
            out.append(row)
        return out"""
    exec(source, names := {})
    return names["product"]

def transpose(rows):
    """Columns as rows."""
    return list(zip(*rows))

class SparseRow(list):
    """A row that is 0 but at some places."""

    __slots__ = ("places",)

    def __init__(self, width, places, values):
        super().__init__([0.0] * width)
        self.places = places
        for i, value in zip(places, values):
            self[i] = value

def is_sparse(rows):
    """Whether a matrix consists of sparse rows: all do, or none."""
    return type(rows[0]) is SparseRow

def matmul(a, b, transpose_a=False, transpose_b=False, where=None):
    """The product of two matrices or of their transposes: each row of A times each column of B. Zeros in sparse
    rows are skipped. If `where` has sparse rows, only their places are computed."""
    if transpose_a and is_sparse(a):
        return spread(a, b)
    if transpose_a and is_sparse(b):
        return [list(row) for row in zip(*spread(b, a))]
    a = transpose(a) if transpose_a else a
    if is_sparse(a):
        b = transpose(b) if transpose_b else b
        return [weighted_sum([row[i] for i in row.places], [b[i] for i in row.places], len(b[0])) for row in a]
    b = b if transpose_b else transpose(b)
    product = dots(len(a[0]))
    if not where or not is_sparse(where):
        return product(a, b)
    pairs = [(row, mask.places) for row, mask in zip(a, where)]
    return [SparseRow(len(b), places, product([row], [b[i] for i in places])[0]) for row, places in pairs]

def weighted_sum(weights, rows, width):
    """The sum of rows of this width, each times its weight."""
    return dots(len(weights))([weights], zip(*rows))[0] if weights else [0.0] * width

def spread(a, b):
    """A^T B for sparse rows in A: row i of the product is the sum of the rows of B, each times its a[i]."""
    weights, rows = [[] for _ in a[0]], [[] for _ in a[0]]
    for sparse, row in zip(a, b):
        for i in sparse.places:
            weights[i].append(sparse[i])
            rows[i].append(row)
    return list(map(weighted_sum, weights, rows, repeat(len(b[0]))))

def matmuls(a, b, **transposes):
    """Many products at once: each matrix in a times its partner in b."""
    return [matmul(x, y, **transposes) for x, y in zip(a, b)]

def softmax(row):
    """Scalar.softmax of floats."""
    top = max(row)
    exps = [math.exp(a - top) for a in row]
    total = sum(exps)
    return [e / total for e in exps]

class Tensor:
    """The engine that computes with matrices. data is rows of floats (of a loss, one float), and grad is its
    gradient in the same shape, or None as long as there is none."""

    __slots__ = "data", "grad", "rule"

    def __init__(self, data, rule=None):
        self.data, self.grad = data, None
        if rule and recording:
            self.rule = rule
            tape.append(self)

    def backprop(self):
        if self.grad is not None:  # None: the loss does not depend on it
            self.rule(self.grad)

    def receive(self, grad):
        """Add to the gradient. Rows that were handed over never change: others may hold them too."""
        self.grad = grad if self.grad is None else [list(map(plus, *rows)) for rows in zip(self.grad, grad)]

    def wrap(weights):
        """Weights as Tensors, around the rows themselves."""
        return {name: Tensor(rows) for name, rows in weights.items()}

    def grads(w):
        """The gradients of wrapped weights, as rows of floats."""
        return {name: t.grad or [[0.0] * len(row) for row in t.data] for name, t in w.items()}

    def floats(x):
        """The numbers in x, as rows of floats."""
        return x.data

    # A row of the table goes wherever its id is: its gradient is the sum of those there.
    def embed(table, ids):
        ids = list(ids)

        def rule(g):
            grad = [[0.0] * len(g[0])] * len(table.data)
            for i, row in zip(ids, g):
                grad[i] = list(map(plus, grad[i], row))
            table.receive(grad)

        return Tensor([table.data[i] for i in ids], rule)

    # y = x + z: both slopes are 1, so both get g.
    def add(x, z):
        def rule(g):
            x.receive(g)
            z.receive(g)

        return Tensor([list(map(plus, *rows)) for rows in zip(x.data, z.data)], rule)

    # y[t][o] is the sum over i of w[o][i] x[t][i], plus b[o]. So x[t][i] goes into y[t][o] for every o with slope
    # w[o][i], and dx = g W. w[o][i] goes into it for every t with slope x[t][i], and dW = g^T x. b[o] goes into
    # it for every t with slope 1, and db is the sum of the rows of g. Where a relu made x 0 it is flat, so x
    # needs no gradient there.
    def linear(x, w, bias=None):
        y = matmul(x.data, w.data, transpose_b=True)
        if bias:
            y = [list(map(plus, row, bias.data[0])) for row in y]

        def rule(g):
            x.receive(matmul(g, w.data, where=x.data))
            w.receive(matmul(g, x.data, transpose_a=True))
            if bias:
                bias.receive([list(map(sum, zip(*g)))])

        return Tensor(y, rule)

    # y = s x, where s = (x.x / n + eps)^(-1/2) has the slope -s^3 x / n. So dx = s g - s^3 x (g.x) / n, and
    # as s x = y, that is s (g - y (g.y) / n).
    def rmsnorm(x):
        scales = [(sumprod(row, row) / len(row) + 1e-5) ** -0.5 for row in x.data]
        y = [[a * scale for a in row] for row, scale in zip(x.data, scales)]

        def rule(g):
            along = [sumprod(a, b) / len(a) for a, b in zip(g, y)]
            rows = zip(scales, along, g, y)
            x.receive([[scale * (a - m * b) for a, b in zip(gs, ys)] for scale, m, gs, ys in rows])

        return Tensor(y, rule)

    # Taking the mean off takes it off the gradient, too: each x lowers its whole row by 1/n. After the rmsnorm u,
    # y = u gain + bias. So du = g gain, and the gain gets the sum of g u over the rows, the bias that of g.
    def layernorm(x, gain, bias):
        def center(rows):
            means = [sum(row) / len(row) for row in rows]
            return [[a - mean for a in row] for row, mean in zip(rows, means)]

        u = Tensor.rmsnorm(Tensor(center(x.data), lambda g: x.receive(center(g))))
        y = [[a * b + c for a, b, c in zip(row, *gain.data, *bias.data)] for row in u.data]

        def rule(g):
            u.receive([list(map(mul, row, gain.data[0])) for row in g])
            gain.receive([list(map(sumprod, zip(*g), zip(*u.data)))])
            bias.receive([list(map(sum, zip(*g)))])

        return Tensor(y, rule)

    # The slope of max(0, x) is 1 where it is positive and 0 elsewhere.
    def relu(x):
        places = [[i for i, a in enumerate(row) if a > 0] for row in x.data]

        def keep(rows):
            return [SparseRow(len(row), at, [row[i] for i in at]) for row, at in zip(rows, places)]

        return Tensor(keep(x.data), lambda g: x.receive(keep(g)))

    # y = x (1 + t) / 2 with t = tanh(c (x + k x^3)), which has the slope (1 - t^2) c (1 + 3 k x^2).
    def gelu(x):
        c, k = math.sqrt(2 / math.pi), 0.044715
        ts = [[math.tanh(c * (a + k * a * a * a)) for a in row] for row in x.data]

        def slope(a, t):
            return (1 + t + a * (1 - t * t) * c * (1 + 3 * k * a * a)) / 2

        def rule(g):
            x.receive([[b * slope(a, t) for b, a, t in zip(*rows)] for rows in zip(g, x.data, ts)])

        return Tensor([[a * (1 + t) / 2 for a, t in zip(*rows)] for rows in zip(x.data, ts)], rule)

    # For each document and head y = P V, where P is the softmax of S = Q K^T / sqrt(size). As in linear
    # dV = P^T g, dP = g V^T, and but for sqrt(size) dQ = dS K and dK = dS^T Q. Raising s[i] raises p[i] by p[i],
    # and making the sum 1 again lowers every p[j] by p[j] p[i]: ds[i] = p[i] (dp[i] - the sum of all p[j] dp[j]).
    # What a cache held before is a constant. A long document goes block by block, each block of rows with its own
    # past alone: that leaves out most of the future, which is half of the work. So the gradient of a key or a
    # value is the sum of what its own block and all later ones pass on.
    def attention(q, k, v, lengths, caches, n_head):
        size, block = len(q.data[0]) // n_head, 32
        heads = [slice(h * size, (h + 1) * size) for h in range(n_head)]
        blocks = []
        for stop, length, (keys, values) in zip(accumulate(lengths), lengths, caches):
            for start in range(stop - length, stop, block):
                end = min(start + block, stop)
                keys += k.data[start:end]
                values += v.data[start:end]
                blocks.append((slice(start, end), slice(stop - length, end), keys[:], values[:]))
        spans, pasts, ks, vs = zip(*blocks)

        def split(blocks):  # rows of each block -> a matrix for each block and head
            return [[row[head] for row in rows] for rows in blocks for head in heads]

        def join(parts, spans):  # and back to one matrix: the last rows of each part go to its span, and add up
            out, parts = [], iter(parts)
            for span in spans:
                rows = zip(*[part[span.start - span.stop :] for part in islice(parts, n_head)])
                rows = [[*chain(*row)] for row in rows]
                out[span] = [list(map(plus, *both)) for both in zip(out[span], rows)] + rows[len(out[span]) :]
            return out

        def scaled(rows):
            return [[a / size**0.5 for a in row] for row in rows]

        def shares(scores, seen):  # of the past alone: no position looks ahead
            return softmax(scores[:seen]) + [0.0] * (len(scores) - seen)

        qs, ks, vs = split([scaled(q.data[span]) for span in spans]), split(ks), split(vs)
        scores = matmuls(qs, ks, transpose_b=True)
        ps = [list(map(shares, rows, count(len(rows[0]) - len(rows) + 1))) for rows in scores]

        def softmax_rule(p, dp):
            mean = sumprod(p, dp)
            return [a * (b - mean) for a, b in zip(p, dp)]

        def rule(g):
            gs = split([g[span] for span in spans])
            dps = matmuls(gs, vs, transpose_b=True)
            dss = [list(map(softmax_rule, p, dp)) for p, dp in zip(ps, dps)]
            q.receive(scaled(join(matmuls(dss, ks), spans)))
            k.receive(join(matmuls(dss, qs, transpose_a=True), pasts))
            v.receive(join(matmuls(ps, gs, transpose_a=True), pasts))

        return Tensor(join(matmuls(ps, vs), spans), rule)

    # log(sum of e^z) has as slopes the softmax p, and -z[target] has -1 there: dz = (p - [target]) / n.
    def cross_entropy(logits, targets):
        loss, probs = 0.0, []
        for row, target in zip(logits.data, targets):
            top = max(row)
            exps = [math.exp(a - top) for a in row]
            total = sum(exps)
            probs.append([e / total for e in exps])
            loss += math.log(total) + top - row[target]

        def rule(g):
            grad = [[g * a / len(targets) for a in row] for row in probs]
            for row, target in zip(grad, targets):
                row[target] -= g / len(targets)
            logits.receive(grad)

        return Tensor(loss / len(targets), rule)


# 10. Subwords ---------------------------------------------------------------------------------------------
#
# Characters are many and say little. Byte-pair encoding (Gage 1994; Sennrich et al. 2016) finds better tokens:
# the pair of neighbors that occurs most often becomes a token of its own, again and again, until "the" is one,
# and even " of the ", as nothing is split at spaces. Here a text in tokens is a string of chr(id), so that
# Python's own split finds every place of a pair at once. Only the counts of the neighbors of those places change:
# counting all pairs anew for each merge takes about a hundred times as long.

BETWEEN = chr(0x10FFFF)  # parts documents: no pair reaches across

def learn_merges(docs, n, new):
    """Learn up to n merges, (left id, right id), from documents that are strings of chr(id); new is the first id
    that is free. Ties go to the smaller pair, and it ends when no pair occurs twice. Returns the merges, and the
    documents in the new tokens."""
    text, merges = BETWEEN.join(docs), []
    counts = Counter(map(plus, text, text[1:]))
    counts = {pair: count for pair, count in counts.items() if BETWEEN not in pair}
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapify(heap)
    while heap and len(merges) < n:
        count, pair = heappop(heap)
        if -count != counts[pair]:  # it has become rarer since it went on the heap
            if counts[pair] > 1:
                heappush(heap, (-counts[pair], pair))
            continue
        left, right, merged = *pair, chr(new + len(merges))
        merges.append((ord(left), ord(right)))
        pieces = text.split(pair)
        text = merged.join(pieces)
        inside = pieces[1:-1].count("")  # two places of the pair, side by side
        changes = Counter({merged + merged: inside})
        changes[right + left] -= inside
        for char, times in Counter(piece[-1] for piece in pieces[:-1] if piece).items():
            changes[char + left] -= times
            changes[char + merged] += times
        for char, times in Counter(piece[0] for piece in pieces[1:] if piece).items():
            changes[right + char] -= times
            changes[merged + char] += times
        for other, change in changes.items():
            if BETWEEN not in other:
                counts[other] = counts.get(other, 0) + change
                if change > 1:
                    heappush(heap, (-change, other))
        counts[pair] = 0
    return merges, text.split(BETWEEN)

class BPETokenizer(CharTokenizer):
    """Characters, then a token for each merge, and BOS as the last id."""

    def __init__(self, docs, merges):
        super().__init__(docs)
        self.merges = merges
        for left, right in merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])
        self.bos, self.vocab_size = len(self.tokens), len(self.tokens) + 1

    def encode(self, text):
        """The ids of a text."""
        return list(map(ord, self.merge("".join(map(chr, super().encode(text))))))

    def merge(self, text):
        """Make the merges in a string of chr(id), in the order in which they were learned."""
        for new, (left, right) in enumerate(self.merges, len(self.ids)):
            text = text.replace(chr(left) + chr(right), chr(new))
        return text


# 11. The GPU ----------------------------------------------------------------------------------------------
#
# A GPU multiplies thousands of numbers at once, but they must travel there and back. So the engine vulkan is the
# engine Tensor with its big matrix products sent to vulkan_gemm.py, a sidecar that speaks to any GPU through the
# system's Vulkan loader, and the small ones left here. Where the line lies, the sidecar measures at the start.

plain_matmul, plain_matmuls = matmul, matmuls

@lru_cache(maxsize=None)
def gpu_products():
    """A matmul and a matmuls that send to the GPU what gains by it. Raises a UserError if there is no loader, no
    device or no memory."""
    try:
        from vulkan_gemm import VulkanError, VulkanGemm, offload
    except ImportError:
        raise UserError("--vulkan needs vulkan_gemm.py beside microgpt.py") from None

    def asked(function):
        def ask(*args, **settings):
            try:
                return function(*args, **settings)
            except VulkanError as error:
                raise Halt(f"the GPU cannot go on: {error}") from None

        return ask

    gpu = asked(VulkanGemm)()
    atexit.register(gpu.close)
    return list(map(asked, asked(offload)(gpu, plain_matmul, plain_matmuls)))

def use_engine(name):
    """The engine of this name: scalar, tensor or vulkan. Only one is in use at a time."""
    global matmul, matmuls
    matmul, matmuls = gpu_products() if name == "vulkan" else (plain_matmul, plain_matmuls)
    return Scalar if name == "scalar" else Tensor


# 12. All the cores ----------------------------------------------------------------------------------------
#
# Every large model is trained like this: many workers have the same weights, each computes the gradients of its
# share of the batch, and the mean of them all, each by the size of its share, is the gradient of the whole. Python
# runs one thread at a time, so a worker is a process. In each step the weights go out to the workers and the
# gradients come back, as plain bytes; only this process moves the weights. Twice a second a worker gives a sign of
# life, so that one that hangs is noticed. When nobody is there to take it, this process has died, and the worker
# ends, too.

def pack(weights):
    """The numbers of weights or gradients, in one array."""
    return array("d", chain.from_iterable(chain.from_iterable(weights.values())))

def unpack(config, numbers):
    """And back."""
    numbers = iter(numbers)
    return {name: [list(islice(numbers, n)) for _ in range(rows)] for name, (rows, n) in shapes(config).items()}

def predictions(batch):
    """The number of tokens that a batch predicts."""
    return sum(map(len, batch)) - len(batch)

STOPS = signal.SIGINT, signal.SIGTERM

def work(pipe, others, engine, config):
    """The life of a worker: to send back the loss and the gradients of each share of a batch that comes."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # it is for the parent to stop
    for other in others:
        other.close()  # the parent's ends, where a fork copied them: open, they would hide its death
    lock = threading.Lock()

    def send(message):
        try:
            with lock:
                pipe.send(message)
        except OSError:
            os._exit(1)

    def live():
        while True:
            send(None)
            time.sleep(0.5)

    gc.disable()
    try:
        threading.Thread(target=live, daemon=True).start()
        engine = use_engine(engine)
        while True:
            batch, part, data = pipe.recv()
            loss, grads = loss_and_grads(engine, config, unpack(config, array("d", data)), batch)
            send((part * loss, array("d", [part * g for g in pack(grads)]).tobytes()))
    except (UserError, MemoryError, RuntimeError) as error:  # there may be no thread for it
        send(str(error) or "there is not enough memory")
    except (EOFError, OSError):
        os._exit(1)

class Workers:
    """n processes, each with the engine of this name: called with weights and a batch it gives what loss_and_grads
    does, or raises a Halt."""

    def __init__(self, n, engine, config):
        from multiprocessing import connection, get_context  # slow to import, and few runs need it

        self.config, self.pipes, self.processes = config, [], []
        self.outbox, self.inboxes = SimpleQueue(), [SimpleQueue() for _ in range(n)]
        atexit.register(self.stop)  # after that import, and so before what multiprocessing does at the end
        context = get_context("spawn" if engine == "vulkan" else None)  # a GPU does not outlive a fork
        try:
            if hasattr(signal, "pthread_sigmask"):  # not on Windows: signals to stop wait, and no worker gets them
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            for _ in range(n):
                pipe, theirs = connection.Pipe()
                self.pipes.append(pipe)
                process = context.Process(target=work, args=(theirs, self.pipes[:], engine, config), daemon=True)
                process.start()
                self.processes.append(process)
                theirs.close()
            for task in (self.send, *(partial(self.listen, i) for i in range(n))):
                threading.Thread(target=task, daemon=True).start()
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot start {n} workers: {getattr(error, 'strerror', error)}") from None
        finally:
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def stop(self):
        """End all workers, whatever they are at."""
        self.outbox.put(None)
        for process in self.processes:
            process.kill()
        for process in self.processes:  # in a loop of its own: a Ctrl-C in here must leave none alive
            process.join()

    def __call__(self, weights, batch):
        data, n = pack(weights).tobytes(), len(self.pipes)
        for i in range(n):
            self.outbox.put((i, (batch[i::n], predictions(batch[i::n]) / predictions(batch), data)))
        losses, grads = zip(*map(self.receive, range(n)))  # in this order, so that the sums are always the same
        grads = [array("d", part) for part in grads]
        return sum(losses), unpack(self.config, map(sum, zip(*grads)))

    def send(self):
        """Send on what is in the outbox. In a thread, as a worker that hangs takes nothing."""
        for i, message in iter(self.outbox.get, None):
            try:
                self.pipes[i].send(message)
            except OSError:  # it has died, as listen() will say
                pass
            except MemoryError:
                self.inboxes[i].put("there is not enough memory")

    def listen(self, i):
        """Put what worker i sends in its inbox. In a thread, as it may hang in the middle of a message."""
        try:
            while True:
                self.inboxes[i].put(self.pipes[i].recv())
        except (EOFError, OSError):
            self.inboxes[i].put("it has died")

    def receive(self, i):
        """The part of worker i in the loss and in the gradients."""
        message, silence = None, 0
        while message is None and silence < 4:  # not one wait of 4 s: this process, too, may have been stopped
            try:
                message, silence = self.inboxes[i].get(timeout=1), 0  # None is a sign of life
            except Empty:
                silence += 1
        if isinstance(message, tuple):
            return message
        self.processes[i].join(0.5)
        code = self.processes[i].exitcode
        ended = "" if code is None else f" (exit code {code})"
        raise Halt(f"worker {i + 1} of {len(self.pipes)}: {message or 'no sign of life'}{ended}")


# ==========================================================================================================
# PART THREE: A TOOL FOR EVERY DAY
# ==========================================================================================================

# 13. GPT-2 as published -----------------------------------------------------------------------------------
#
# Part one has the reference's lean layers. GPT-2's (Radford et al. 2019; `--arch gpt2`) differ in four things:
# layernorm for rmsnorm, gelu for relu, a bias in every linear layer, and a last norm before lm_head in place of
# the first one. They stand beside their siblings: the operations in sections 4 and 9, the rest in section 5.


# 14. Optimizers in historical order -----------------------------------------------------------------------
#
# Each adds one idea to the one before. Gradient descent takes a step down the slope. Momentum goes on in the
# direction in which it has been going. RMSprop divides by the size that gradients have had lately, weight by
# weight. Adam (section 6) does both. AdamW also pulls each weight towards 0, apart from the gradient. They all
# take the same arguments and heed what they need of them.

def sgd(weights, grads, m, v, step, lr, **_):
    """Stochastic gradient descent (Robbins, Monro 1951)."""
    for w, g in rows_of(weights, grads):
        for i in range(len(w)):
            w[i] -= lr * g[i]

def momentum(weights, grads, m, v, step, lr, beta1=0.85, **_):
    """The heavy ball (Polyak 1964)."""
    for w, g, mw in rows_of(weights, grads, m):
        for i in range(len(w)):
            mw[i] = beta1 * mw[i] + g[i]
            w[i] -= lr * mw[i]

def rmsprop(weights, grads, m, v, step, lr, beta2=0.99, eps=1e-8, **_):
    """A running mean of squares (Tieleman, Hinton 2012)."""
    for w, g, vw in rows_of(weights, grads, v):
        for i in range(len(w)):
            vw[i] = beta2 * vw[i] + (1 - beta2) * g[i] * g[i]
            w[i] -= lr * g[i] / (math.sqrt(vw[i]) + eps)

def adamw(weights, grads, m, v, step, lr, weight_decay=0.01, **settings):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019)."""
    for (w,) in rows_of(weights):
        for i in range(len(w)):
            w[i] -= lr * weight_decay * w[i]
    adam(weights, grads, m, v, step, lr, **settings)

OPTIMIZERS = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": adam, "adamw": adamw}

def clipped(optimizer, limit):
    """An optimizer that first scales all gradients down if their norm, the root of the sum of all their squares,
    is above the limit."""
    def update(weights, grads, *args, **settings):
        norm = math.sqrt(sum(sumprod(row, row) for (row,) in rows_of(grads)))
        if norm > limit:
            grads = {name: [[g * (limit / norm) for g in row] for row in rows] for name, rows in grads.items()}
        optimizer(weights, grads, *args, **settings)

    return update

# What is left of the rate when some share of the run is done: it may also fall along half a cosine (Loshchilov,
# Hutter 2017), or not at all. Warmup lets it rise in a straight line first, while the moments are still guesses.
SCHEDULES = {"linear": lambda done: 1 - done, "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
             "constant": lambda done: 1}

def learning_rate(step, steps, lr, warmup, decay):
    """The learning rate of a step of a run: up over the warmup steps, down over the rest."""
    return lr * (step + 1) / warmup if step < warmup else lr * decay((step - warmup) / (steps - warmup))


# 15. Checkpoints ------------------------------------------------------------------------------------------
#
# What a run has learned is kept in one file, in the .safetensors format: the length of a header, the header
# (JSON, which says of each matrix its type, its shape and where it lies), then the plain numbers. Other tools can
# open it, PyTorch among them, and unlike a pickle it cannot run code. It is written beside its place and renamed
# when it is whole and on the disk: at any instant there is the old file or the new one. read_safetensors
# trusts nothing.

PART = ".microgpt-part"  # ends the name of a file that is not whole yet

@contextmanager
def replacing(path):
    """A file that takes the place of path when it is whole and on the disk; until then that stays as it was."""
    try:
        with open(path + PART, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + PART, path)
    except OSError as error:
        if os.path.isfile(path + PART):
            os.remove(path + PART)
        raise UserError(f"cannot save {path}: {error.strerror or error}") from None

def write_safetensors(path, tensors, metadata):
    """Write matrices and a dictionary of strings to a file, whole or not at all."""
    header, at = {"__metadata__": metadata}, 0
    for name, rows in tensors.items():
        start, at = at, at + 8 * len(rows) * len(rows[0])
        header[name] = {"dtype": "F64", "shape": [len(rows), len(rows[0])], "data_offsets": [start, at]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (row,) in rows_of(tensors):
            file.write(struct.pack(f"<{len(row)}d", *row))

def need(condition, what):
    """Raise a ValueError that says what is wrong, unless the condition holds."""
    if not condition:
        raise ValueError(what)

def read_safetensors(path):
    """The matrices, as rows of floats, and the metadata of a file. If it is not whole, any of several errors."""
    need(os.path.isfile(path) or not os.path.exists(path), "it is no file")
    with open(path, "rb") as file:
        content = memoryview(file.read())
    at = end = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(bytes(content[8:end])), {}
    metadata = header.pop("__metadata__")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, (rows, columns) = {"F32": "f", "F64": "d"}[entry["dtype"]], entry["shape"]
        start, at = at, at + rows * columns * struct.calcsize(kind)
        need(entry["data_offsets"] == [start - end, at - end] and start < at <= len(content), f"{name!r}")
        tensors[name] = list(map(list, struct.iter_unpack(f"<{columns}{kind}", content[start:at])))
        need(all(map(math.isfinite, chain(*tensors[name]))), f"{name!r} holds a number that is not finite")
    need(at == len(content), "its length")
    return tensors, metadata

@dataclass
class State:
    """All that a run needs to go on."""

    config: Config
    tokenizer: CharTokenizer
    weights: dict
    m: dict
    v: dict
    rng: random.Random
    step: int = 0
    seen: int = 0  # tokens so far
    recent: tuple = (0.0, 0)  # the sum of the losses since the last validation (section 17), and their number

    def save(self, path, flags):
        """Write a checkpoint. Refuses to replace a good one with numbers that are not finite."""
        tensors = dict(self.weights)
        for kind, moments in (("m", self.m), ("v", self.v)):
            tensors.update({f"optimizer.{kind}.{name}": rows for name, rows in moments.items()})
        if not all(all(map(math.isfinite, row)) for (row,) in rows_of(tensors)):
            raise UserError(f"the weights have overflowed after step {self.step}: try a lower --lr")
        fields = {"flags": flags, "characters": "".join(self.tokenizer.ids), "merges": self.tokenizer.merges,
                  "step": self.step, "seen": self.seen, "recent": self.recent, "random": self.rng.getstate()}
        write_safetensors(path, tensors, {name: json.dumps(value) for name, value in fields.items()})

def load_state(path, parse):
    """The run that a checkpoint holds, and its flags, which parse() makes of a command line."""
    try:
        tensors, metadata = read_safetensors(path)
        fields = {name: json.loads(text) for name, text in metadata.items()}
        need(all(flag.startswith("--") and flag != "--help" for flag in fields["flags"]), "flags")
        flags, characters, merges = parse([*fields["flags"]]), fields["characters"], fields["merges"]
        lengths, total = [1] * len(characters), 0
        for left, right in merges:
            lengths.append(lengths[left] + lengths[right])
            total += lengths[-1]
            need(min(left, right) >= 0 and total <= 50_000_000, "merges")  # a few can make texts beyond all memory
        tokenizer = BPETokenizer(characters, merges)
        config = config_of(flags, tokenizer)
        need(not any(map(vars(flags).get, THIS_TIME)) and config.n_layer <= len(tensors), "flags")
        need("".join(tokenizer.ids) == characters and fields["step"] >= 0, "characters or step")
        parts = []
        for prefix in ("", "optimizer.m.", "optimizer.v."):
            part = {name: tensors.pop(prefix + name) for name in shapes(config) if prefix + name in tensors}
            parts.append(part or zeros(parts[0]))  # a file of weights alone has no moments
            need({n: (len(w), len(w[0])) for n, w in parts[-1].items()} == shapes(config), "the shapes")
        need(not tensors, "matrices that it should not have")
        need(all(min(row) >= 0 for (row,) in rows_of(parts[2])), "a second moment below 0")
        total, number = fields["recent"]
        version, numbers, gauss = fields["random"]
        rng = random.Random()
        rng.setstate((version, tuple(numbers), gauss))
        counts = int(fields["step"]), int(fields["seen"]), (float(total), int(number))
        return State(config, tokenizer, *parts, rng, *counts), flags
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
            struct.error) as error:
        raise UserError(f"{path} is not a whole checkpoint: {type(error).__name__} {error}") from None


# 16. Looking inside ---------------------------------------------------------------------------------------
#
# What does a model make of a text? For each position --explain shows what it expected and what came: -log p of
# that is the loss there, in nats, or with log2 in bits. Then it shows for each head where it looked: a row of the
# map is a position, and the shades in it are the shares that it took of the values up to its own. --trace writes
# the numbers of every step for other programs, to hold a port against; --plot draws the loss as a picture.

def look(config, weights, ids):
    """The logits at each of some positions, and the attention: for each layer and head the shares of each position
    in those up to it."""
    maps = []

    class Watched(Tensor):
        def attention(q, k, v, lengths, caches, n_head):
            size = config.n_embd // n_head
            for start in range(0, config.n_embd, size):
                queries, keys = [[row[start : start + size] for row in x.data] for x in (q, k)]
                scores = matmul(queries, keys, transpose_b=True)
                maps.append([softmax([a / size**0.5 for a in row[: t + 1]]) for t, row in enumerate(scores)])
            return Tensor.attention(q, k, v, lengths, caches, n_head)

    with no_grad():
        logits = gpt(Watched, config, Tensor.wrap(weights), [ids], [new_cache(config)])
    return logits.data, [maps[i : i + config.n_head] for i in range(0, len(maps), config.n_head)]

def explain(config, weights, tokenizer, ids, blocks=True):
    """Yield the lines that show what a model makes of some tokens, in block characters or in ASCII."""
    def name(i):
        return "^" if i == tokenizer.bos else repr(tokenizer.tokens[i])[1:-1].replace(" ", "_")

    def bar(p, width=5):
        fill = " ▏▎▍▌▋▊▉█" if blocks else " #"
        whole, rest = divmod(round(p * width * (len(fill) - 1)), len(fill) - 1)
        return (whole * fill[-1] + fill[rest]).ljust(width)[:width]

    logits, maps = look(config, weights, ids[:-1])
    for row in logits:
        draw(row, 0, 0, None)  # refuses what has overflowed
    with no_grad():
        losses = [Tensor.cross_entropy(Tensor([row]), [i]).data for row, i in zip(logits, ids[1:])]
    yield f"{'token':6}{'next':6}    p   nats   bits  the five likeliest (^ is BOS, _ a space)"
    for token, target, loss, p in zip(ids, ids[1:], losses, map(softmax, logits)):
        best = sorted(range(len(p)), key=lambda i: (-p[i], i))[:5]
        guesses = " ".join(f"{name(i):>2.2} {bar(p[i])}" for i in best)
        facts = f"{p[target]:.3f} {loss:6.3f} {loss / math.log(2):6.3f}"
        yield f"{name(token):5.5} {name(target):5.5} {facts}  {guesses}".rstrip()
    mean = sum(losses) / len(losses)
    yield f"{'mean':17} {mean:6.3f} {mean / math.log(2):6.3f}"
    names, shades = [name(i) for i in ids[:-1]], "·░▒▓█" if blocks else ".:+*#"
    wide = 2 if 7 + config.n_head * (2 * len(names) + 1) <= 80 else 1
    abreast = max(1, (80 - 7) // (wide * len(names) + 1))
    for layer, heads in enumerate(maps):
        for first in range(0, len(heads), abreast):
            some = heads[first : first + abreast]
            span = f"layer {layer}, heads {first} to {first + len(some) - 1}"
            yield f"\n{span}: where each row looks, from {shades[0]} under 1/8 to {shades[-1]} over 7/8"
            yield (" " * 7 + " ".join("".join(each[0].ljust(wide) for each in names) for _ in some)).rstrip()
            for t, row in enumerate(zip(*some)):
                cells = ["".join(shades[round(p * 4)] * wide for p in shares) for shares in row]
                yield f"{names[t]:6.6} " + " ".join(cell.ljust(wide * len(names)) for cell in cells).rstrip()

PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" width="800" height="500" viewBox="0 0 800 500"><style>
svg { color: #333; font: 12px monospace } rect { fill: #fff } text { fill: currentColor } .mark { color: #e5484d }
path, polyline { fill: none; stroke: currentColor; stroke-width: 1.5 } .mean { color: #2f81f7; stroke-width: 2.5 }
.dots { stroke-width: 6; stroke-linecap: round } .loss { color: #7a8494; stroke-opacity: 0.7; stroke-width: 1 }
.rate { color: #2da160 } .grid { stroke-opacity: 0.15 } .middle { text-anchor: middle } .end { text-anchor: end }
@media (prefers-color-scheme: dark) { svg { color: #ddd } rect { fill: #16191d } } .validation { color: #e0790b }
.title { font: bold 15px monospace }</style><rect width="800" height="500"/>"""

def limits(values):
    """A range somewhat wider than that of the values, never empty. One from 0 stays so."""
    low, high = min(values, default=0), max(values, default=0)
    edge = (high - low) / 40 if high - low > 1e-7 * abs(high) else abs(high) / 10 or 1
    return low and low - edge, high + edge

def round_ticks(low, high, number, least=0):
    """About so many numbers within the limits: multiples of least or more, 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / number))
    gap = max(least, next(unit * power for unit in (1, 2, 5, 10) if unit * power * number >= high - low))
    return [i * gap for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]

def smooth(points, high):
    """The mean of a thirtieth of a curve about each point, less at its ends. What is over high counts as high."""
    size, sums = len(points) // 60, [0, *accumulate(min(y, high) for _, y in points)]
    spans = ((max(0, i - size), min(len(points), i + size + 1)) for i in range(len(points)))
    return [(step, (sums[end] - sums[start]) / (end - start)) for (step, _), (start, end) in zip(points, spans)]

def thin(points):
    """The lowest and the highest point of each thousandth of a curve."""
    size = len(points) // 1000 + 1
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [point for part in parts for point in sorted({f(part, key=lambda p: p[1]) for f in (min, max)})]

def svg_text(x, y, text, kind, line=""):
    """A text, and a line that belongs to it, as SVG."""
    return f'<path class="{kind}" d="{line}"/><text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'

def draw_panel(low, high, top, bottom, across, curves):
    """Curves over an axis from low to high, as SVG. curves are (name, points), and across(step) is an x."""
    up = lambda y: bottom - (min(y, high) - low) / (high - low) * (bottom - top)  # in a picture y grows downwards
    for y in round_ticks(low, high, (bottom - top) / 28):
        yield svg_text(82, up(y) + 4, f"{y:,.10g}", "grid end", f"M90,{up(y):.1f}H770")
    for x, (name, points) in zip((90, 310, 480), curves):
        places = [f"{across(step):.1f},{up(y):.1f}" for step, y in thin(points)]
        dots = "".join(f"M{place}h0" for place in (places if "validation" in name else places[-1:]))
        yield svg_text(x + 32, top - 10, name, name, f"M{x},{top - 13.5}h24")
        yield f'<polyline class="{name}" points="{" ".join(places)}"/><path class="dots {name}" d="{dots}"/>'

def loss_plot(title, losses, validation, rates):
    """A training as an SVG picture. The title is any text, the others are lists of (step, value), maybe empty. The
    axis fits the usual losses: a curve beyond it runs along its edge, and a note names the worst, such as nan."""
    raw, held_out, rate = ([(step, round(y, 99)) for step, y in points if abs(y) < 1e99]
                           for points in (losses, validation, rates))
    usual = max(sorted(y for _, y in p)[(len(p) - 1) * 9 // 10] for p in ([(0, 0)], raw[:5], raw, held_out) if p)
    low, high = limits([y for _, y in raw + held_out if y <= 3 * usual])
    first, last = limits([step for step, _ in losses + validation + rates])
    across = lambda step: 90 + (step - first) / (last - first) * 680
    title = "".join(filter(str.isprintable, " ".join(title[:500].split())))
    lines = wrap(title, 84 if title.isascii() else 40, max_lines=3, placeholder=" ...")
    svg = [PICTURE, *(svg_text(400, 30 + 20 * i, line, "middle title") for i, line in enumerate(lines))]
    notes = [(name, *p) for name, points in (("training", losses), ("validation", validation)) if points
             for p in [max(points, key=lambda p: p[1] if abs(p[1]) < 1e99 else math.inf)] if not p[1] <= high]
    top = 65 + 20 * len(lines) + 18 * len(notes)
    for i, (name, step, y) in enumerate(notes, 1):
        x, text = across(step), f"{name} loss {y:.4g} at step {step:,}"
        svg.append(svg_text(max(340, x), top - 12 - 18 * i, text, "mark end", f"M{x:.1f},{top}V355"))
    for x in round_ticks(first, last, 7, 1):
        svg.append(svg_text(across(x), 477, f"{x:,.10g}", "grid middle", f"M{across(x):.1f},{top}V460"))
    curves = [("loss (nats a token)", raw), ("running mean", smooth(raw, high)), ("in validation", held_out)]
    svg += draw_panel(low, high, top, 355, across, curves[: 2 + bool(held_out)])
    svg += draw_panel(*limits([0, *(y for _, y in rate)]), 388, 460, across, [("learning rate", rate)])
    return "\n".join([*svg, svg_text(430, 494, "step", "middle"), "</svg>\n"])

def traced(training, path, state, rate_at):
    """The steps of a training, each also written to a file as a line of JSON, numbers with all their digits. The
    first has the sum of squares of the gradient of each matrix, too."""
    try:
        with open(path, "a" if state.step else "w", encoding="utf-8") as file:
            for step, loss, grads, batch in training:
                squares = {name: sum(sumprod(row, row) for row in rows) for name, rows in grads.items()}
                documents, norm = list(map(state.tokenizer.decode, batch)), math.sqrt(sum(squares.values()))
                facts = {"step": step + 1, "documents": documents, "tokens": batch, "loss": loss,
                         "learning_rate": rate_at(step), "gradient_norm": norm,
                         "tokens_so_far": state.seen + predictions(batch)}
                if step == 0:
                    facts["gradient_squares"] = squares
                try:
                    print(json.dumps(facts), file=file, flush=True)
                finally:
                    yield step, loss, grads, batch  # even so: its weights have moved
    except OSError as error:
        raise Halt(f"cannot write {path}: {error.strerror}") from None


# 17. The command line -------------------------------------------------------------------------------------
#
# Every flag has the reference's value unless it is given. Standard output is the run; standard error gets one
# line if something is wrong, and the exit status is then 2 for the command line, 128 and its number for a signal,
# and 1 for everything else.

NAMES = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"

def find_corpus(patterns):
    """The files that some globs match, sorted. Without globs: input.txt here, or beside this script, or else the
    reference's names from the network."""
    if not patterns:
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "input.txt")
        return [next(filter(os.path.exists, ("input.txt", beside)), None) or download(NAMES, "input.txt")]
    try:
        found = [[p] if os.path.exists(p) else glob.glob(p, recursive=True) or [p] for p in patterns]
    except Exception as error:  # of a pattern that is none, by the version of Python
        raise UserError(f"--corpus: {error}") from None
    return sorted(set(map(os.path.normpath, chain(*found))))

def download(url, path):
    """Fetch a file, whole or not at all. Returns its path."""
    from urllib.request import urlopen  # slow to import, and few runs need it

    try:
        with urlopen(url, timeout=5) as response:
            content = response.read()
    except Exception as error:  # so much can go wrong on a network
        advice = f"put a text there, a document per line, or name one with --corpus ({url}: {error})"
        raise UserError(f"there is no {path}: {advice}") from None
    with replacing(path) as file:
        file.write(content)
    return path

class UsageError(UserError):
    """A command line that makes no sense."""

    status = 2

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors."""

    def error(self, message):
        raise UsageError(message)

def number(kind, low, below=math.inf):
    """An argparse type: numbers n with low <= n < below."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value < below:
                return value
        what = f"a {'whole ' * (kind is int)}number from {low}" + f" to below {below}" * (below < math.inf)
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return parse

def make_parser():
    """The flags, by group."""
    about = "Train a GPT on a text and sample from it. Without flags it does what the reference does."
    parser = Parser(prog="microgpt", usage="%(prog)s [flags]", description=about, allow_abbrev=False)
    natural, size = number(int, 0, 10**12), number(int, 1, 10**9)
    real, share = number(float, 0), number(float, 0, 1)
    sizes = lambda text: list(map(size, text.split(",")))

    def flag(names, kind, default, help, **more):
        *names, metavar = names.split()
        more.update({"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": metavar})
        help += f" ({default})" if default not in (None, "") else ""
        group.add_argument(*names, default=default, help=help, **more)

    group = parser.add_argument_group("data")
    flag("--corpus GLOB", str, None, "text files, a document per line; repeatable (input.txt)", action="append")
    group.add_argument("--stream", action="store_true", help="the corpus is one continuous text, not lines")
    flag("--vocab-size N", number(int, 0, 100_000), 0, "byte-pair merges to learn, 0: characters alone")

    group = parser.add_argument_group("model")
    flag("--layers N", size, 1, "how many layers")
    flag("--d-model --n-embd N", size, 16, "width: channels of a position")
    flag("--heads N", size, 4, "attention heads of a layer")
    flag("--context --block-size N", size, 16, "how many tokens the model can see")
    flag("--arch NAME", ["microgpt", "gpt2"], "microgpt", "gpt2: with LayerNorm, biases, GELU")

    group = parser.add_argument_group("training")
    flag("--steps N", natural, 1000, "training steps in all")
    flag("--batch-size N", size, 1, "documents a step")
    flag("--optimizer NAME", list(OPTIMIZERS), "adam", "what moves the weights")
    flag("--lr X", real, 0.01, "the learning rate at its highest")
    flag("--beta1 X", share, 0.85, "how long it remembers gradients")
    flag("--beta2 X", share, 0.99, "how long it remembers their squares")
    flag("--eps X", number(float, 1e-20), 1e-8, "keeps it from dividing by 0")
    flag("--weight-decay X", real, 0.01, "adamw: how hard it pulls weights to 0")
    flag("--schedule NAME", list(SCHEDULES), "linear", "how the learning rate falls")
    group.add_argument("--cosine", dest="schedule", action="store_const", const="cosine", help="--schedule cosine")
    flag("--warmup-steps N", natural, 0, "steps in which it rises first")
    flag("--clip-grad X", number(float, 1e-20), None, "the largest norm that all gradients together may have")
    group.add_argument("--no-clip-grad", dest="clip_grad", action="store_const", const=None, help="no such limit")
    flag("--seed N", number(int, -(10**12), 10**12), 42, "seed of the random generator")

    group = parser.add_argument_group("watching")
    flag("--val-fraction X", share, 0.0, "share of the corpus to hold out for validation")
    flag("--eval-every N", size, 100, "validate every N steps")
    flag("--div-warn PCT", real, None, "warn if the validation loss is so many %% above training (20)")
    flag("--div-crit PCT", real, None, "stop if it is so many %% above training")
    flag("--gen-every N", size, None, "show a sample every N steps")
    flag("--plot FILE.svg", str, None, "draw the loss")
    flag("--trace FILE.jsonl", str, None, "write a line of numbers a step")
    flag("--explain TEXT", str, None, "show what the model makes of this text")

    group = parser.add_argument_group("keeping")
    flag("--save FILE", str, None, "keep the run in this file, to go on with --resume")
    flag("--save-every N", size, 500, "save every N steps, too")
    flag("--resume FILE", str, None, "go on with this run; other flags change what it had")

    group = parser.add_argument_group("sampling")
    flag("--samples N", natural, 20, "how many samples")
    flag("--temperature X", real, 0.5, "1: by the model's odds, 0: always the likeliest")
    flag("--top-k N", natural, 0, "draw from the N likeliest tokens, 0: from all")
    flag("--prompt TEXT", str, "", "what every sample begins with")
    flag("--max-tokens N", size, None, "at most so many new tokens a sample (the context)")

    group = parser.add_argument_group("engine")
    flag("--engine NAME", ["scalar", "tensor", "vulkan"], "tensor", "scalar: part one alone; vulkan: on the GPU")
    group.add_argument("--vulkan", dest="engine", action="store_const", const="vulkan", help="--engine vulkan")
    flag("--workers N", size, 1, "processes to share each batch")
    group.add_argument("--autotune", action="store_true", help="train nothing, but find the fastest settings")
    flag("--batch-sizes N,N", sizes, None, "those that it tries (1,4,16)")
    flag("--worker-counts N,N", sizes, None, "and as many workers (1,2,4 and so on, to the number of cores)")
    return parser

FIXED = ("layers", "d_model", "heads", "context", "arch", "vocab_size", "stream")  # by what is in a checkpoint
THIS_TIME = ("save", "resume", "plot", "trace", "explain", "autotune", "batch_sizes", "worker_counts")  # not saved

def parse_args(argv):
    """The flags as a namespace, and with --resume the run in that file, whose flags hold unless they are given
    anew. Raises a UsageError if they make no sense."""
    parser, state = make_parser(), None
    args = parser.parse_args(argv)
    if args.resume is not None:
        state, saved = load_state(args.resume, parser.parse_args)
        corpus, args = args.corpus, parser.parse_args(argv, argparse.Namespace(**vars(saved)))
        args.corpus, args.save = corpus or saved.corpus, args.save or args.resume
        for name in FIXED:
            new, old = getattr(args, name), getattr(saved, name)
            if new != old:
                parser.error(f"--{name.replace('_', '-')} {new} contradicts {args.resume}, which has {old}")
    check(args)
    return args, state

def as_argv(args, leave_out):
    """The command line that gives these flags, but for some."""
    plain, out = vars(make_parser().parse_args([])), []
    if args.resume and "resume" not in leave_out:
        plain = {}  # what is not said is what the checkpoint has
    for name, value in vars(args).items():
        for each in value if isinstance(value, list) else [value]:
            if value != plain.get(name) and each is not False and name not in leave_out:
                out.append(f"--{name.replace('_', '-')}" + ("" if each is True else f"={each}"))
    return out

def config_of(args, tokenizer):
    """The model that the flags describe."""
    return Config(tokenizer.vocab_size, args.layers, args.d_model, args.heads, args.context, args.arch)

def check(args):
    """Refuse flags that do not go together, and files that cannot be written: better now than after hours."""
    if args.d_model % args.heads:
        raise UsageError(f"--heads {args.heads} does not divide --d-model {args.d_model}")
    if args.layers * 12 * args.d_model**2 + args.context * args.d_model > 10**9:
        raise UsageError("a model of more than a billion weights is too large for this program")
    if 0 < args.steps < args.warmup_steps:
        raise UsageError(f"--warmup-steps {args.warmup_steps} is longer than the run, --steps {args.steps}")
    if args.workers > args.batch_size:
        raise UsageError(f"--workers {args.workers} is more than --batch-size {args.batch_size}: nothing to share")
    if (args.div_warn, args.div_crit) != (None, None):
        args.val_fraction = args.val_fraction or 0.1
    if args.save and os.path.exists(args.save) and args.save != args.resume:
        load_state(args.save, make_parser().parse_args)  # nothing but a checkpoint is replaced
    corpus = filter(os.path.exists, find_corpus(args.corpus) if args.corpus else ())
    taken = [os.path.realpath(path) for path in (args.save, args.resume, *corpus) if path]
    for name, end in (("save", ""), ("plot", ".svg"), ("trace", ".jsonl")):
        path = getattr(args, name)
        if path is None:
            continue
        if not path or not path.endswith(end) or os.path.isdir(path) or end and os.path.realpath(path) in taken:
            raise UsageError(f"--{name} needs a file of its own, {end and f'*{end}, '}not {path!r}")
        try:
            open(path + PART, "wb").close()
            os.remove(path + PART)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot save {path}: {getattr(error, 'strerror', None) or error}") from None

def load_corpus(args, rng):
    """The documents to train on, shuffled, and those that are held out; a stream is one document, its end held
    out."""
    paths = find_corpus(args.corpus)
    docs = read_documents(paths, args.stream)
    if not any(docs):
        raise UserError(f"there is no text in {', '.join(paths)}")
    rng.shuffle(docs)
    if not args.val_fraction:
        return docs, []
    whole = docs[0] if args.stream else docs
    cut = len(whole) - max(1, round(len(whole) * args.val_fraction))
    if cut < 1:
        raise UserError("the corpus is too small to hold a part of it out")
    return ([whole[:cut]], [whole[cut:]]) if args.stream else (whole[:cut], whole[cut:])

def tokenize(args, tokenizer, docs, held_out):
    """From a saved run's tokenizer, or None: the tokenizer, the training documents in a form to take slices of,
    and what makes ids of such a slice."""
    saved, tokenizer = tokenizer, tokenizer or CharTokenizer(docs + held_out)
    tokenizer.encode("".join(sorted(set().union(*docs, *held_out))))  # a saved one may lack some characters
    if not args.vocab_size:
        return tokenizer, docs, tokenizer.encode
    docs = ["".join(map(chr, CharTokenizer.encode(tokenizer, doc))) for doc in docs]
    if saved:
        docs = tokenizer.merge(BETWEEN.join(docs)).split(BETWEEN)
    else:
        merges, docs = learn_merges(docs, args.vocab_size, len(tokenizer.tokens))
        tokenizer = BPETokenizer(tokenizer.tokens, merges)
        if len(merges) < args.vocab_size:
            print(f"microgpt: note: after {len(merges)} merges no pair of tokens occurs twice", file=sys.stderr)
    return tokenizer, docs, lambda text: list(map(ord, text))

# A model can learn its documents by heart and be no better at any other. Validation tells: the loss on documents
# that were held out of training. When it is far above the training loss, both averaged over the same steps, the
# model has begun to memorize.

def held_out_batch(tokenizer, held_out, stream, block_size):
    """The token lists that validation is about: at most 128, spread over all that was held out."""
    if stream:
        ids = tokenizer.encode(held_out[0])
        parts = [ids[start : start + block_size + 1] for start in range(0, len(ids) - 1, block_size)]
    else:
        parts = [[tokenizer.bos, *tokenizer.encode(doc), tokenizer.bos][: block_size + 1] for doc in held_out]
    if not parts:
        raise UserError("the corpus is too small to hold a part of it out")
    return parts[:: -(-len(parts) // 128)]

def mean_loss(engine, config, weights, batch):
    """The mean loss over all tokens that a batch predicts, a document at a time and without recording."""
    with no_grad():
        w = engine.wrap(weights)
        total = sum(batch_loss(engine, config, w, [ids]).data * (len(ids) - 1) for ids in batch)
    return total / predictions(batch)

def judge(args, step, loss, held_out):
    """Print the losses of training and validation; warn or stop if they part."""
    print(f"step {step:4d} / {args.steps:4d} | loss {loss:.4f} on average | validation {held_out:.4f}")
    above = (held_out / max(loss, 1e-9) - 1) * 100
    message = f"at step {step} the validation loss is {above:.0f} % above the training loss"
    if args.div_crit is not None and above > args.div_crit:
        raise Halt(message)
    if above > (20 if args.div_warn is None else args.div_warn):
        print(f"microgpt: warning: {message}", file=sys.stderr)

# The fastest settings depend on the machine and on the model, so --autotune asks them: every choice trains for a
# moment, at a learning rate of 0, then those near the best again and again.

def training_speed(args, state, batches, choice, seconds):
    """Tokens a second, measured over at least so many seconds and one step, after one to warm up."""
    engine, size, n = choice
    workers = Workers(n, engine, state.config) if n > 1 else None
    compute = workers or partial(loss_and_grads, use_engine(engine), state.config)
    plan = batches(size), 10**9, lambda step: 0.0, OPTIMIZERS[args.optimizer]
    training = train(compute, state.weights, state.m, state.v, *plan)
    next(training)
    start, passed, tokens = time.perf_counter(), 0.0, 0
    while passed < seconds or not tokens:
        tokens += predictions(next(training)[-1])
        passed = time.perf_counter() - start
    if workers:
        workers.stop()
    return tokens / passed

def autotune(args, state, batches, limit=45):
    """Print the tokens a second of each choice of engine, batch size and workers, and the command with the best.
    Takes about so many seconds, or less if one is clearly the best."""
    import shlex, subprocess  # slow, and few runs need them

    engines, cores = ["tensor"], os.cpu_count() or 1
    try:
        gpu_products()
        engines.append("vulkan")
    except UserError as error:
        print(f"microgpt: note: --autotune leaves the GPU out: {error}", file=sys.stderr)
    counts = args.worker_counts or [2**i for i in range(cores.bit_length())]
    choices = [each for each in product(engines, args.batch_sizes or [1, 4, 16], counts) if each[2] <= each[1]]
    if not choices:
        raise UsageError("--autotune has nothing to try: a worker needs a document of the batch")
    speeds, end, seconds = {}, time.monotonic() + limit, limit / 3 / len(choices)
    try:
        while len(choices) > 1 or not speeds:
            for choice in choices:
                best = max(speeds.values(), default=math.inf)
                if time.monotonic() + seconds + 2 * predictions(batches(choice[1])(0)) / best > end and speeds:
                    return  # out of time
                if sys.stderr.isatty():
                    print("timing {}, batch size {}, workers {}\x1b[K".format(*choice), end="\r", file=sys.stderr)
                speed = training_speed(args, state, batches, choice, seconds)
                speeds[choice] = max(speed, speeds.get(choice, 0.0))
            choices, seconds = [each for each in choices if speeds[each] > 0.85 * max(speeds.values())], limit / 20
    finally:
        if speeds:
            print(f"{'engine':8} batch size  workers  tokens/s")
            for choice, speed in speeds.items():
                print("{:8} {:10d} {:8d} {:9.0f}".format(*choice, speed))
            args.engine, args.batch_size, args.workers = max(speeds, key=speeds.get)
            flags = as_argv(args, ("autotune", "batch_sizes", "worker_counts"))
            quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
            print(quoted([sys.executable, sys.argv[0], *flags]))

class Signals:
    """SIGINT and SIGTERM: in training the first lets the step end; all others end the run at once."""

    def __init__(self):
        self.caught, self.training, self.saved = 0, False, "nothing was saved"
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.caught:
            os._exit(128 + number)
        self.caught = number
        if not self.training:
            raise KeyboardInterrupt
        if sys.stderr.isatty():
            os.write(2, b"\nmicrogpt: finishing this step; a second time ends at once\n")

class Run:
    """What a command line asks for, from the corpus to the last sample. state is that of a saved run, or None."""

    def __init__(self, args, state, signals):
        self.args, self.signals, self.losses, self.validations = args, signals, [], []
        rng = random.Random(args.seed)
        docs, held_out = load_corpus(args, rng)
        print(f"num docs: {len(docs)}")
        tokenizer, self.docs, self.encode = tokenize(args, state and state.tokenizer, docs, held_out)
        print(f"vocab size: {tokenizer.vocab_size}")
        if state is None:
            config = config_of(args, tokenizer)
            weights = initial_weights(config, rng)
            state = State(config, tokenizer, weights, zeros(weights), zeros(weights), rng)
        self.state = state
        print(f"num params: {sum(map(len, chain(*state.weights.values())))}")
        edge = [] if args.stream else [tokenizer.bos]
        self.prompt = edge + tokenizer.encode(args.prompt) or [tokenizer.ids.get("\n", 0)]
        self.text = edge + tokenizer.encode(args.explain or "") + edge
        if args.explain is not None and len(self.text) < 2:
            raise UserError("--explain needs two tokens at least")
        self.held_out = held_out and held_out_batch(tokenizer, held_out, args.stream, args.context)

    def batches(self, size):
        """A function from a step to its batch, of this size."""
        if self.args.stream:
            return stream_batches(self.docs[0], self.encode, self.args.context, size, self.args.seed)
        return document_batches(self.docs, self.encode, self.state.tokenizer.bos, self.args.context, size)

    def rate_at(self, step):
        """The learning rate of a step."""
        args = self.args
        return learning_rate(step, args.steps, args.lr, args.warmup_steps, SCHEDULES[args.schedule])

    def sample_text(self, rng):
        """The prompt and what the model makes of it."""
        args, state = self.args, self.state
        how = args.max_tokens or args.context, args.temperature, args.top_k, rng
        ids = sample(self.engine, state.config, state.weights, self.prompt, *how)
        return args.prompt + state.tokenizer.decode(takewhile(lambda token: token != state.tokenizer.bos, ids))

    def save(self):
        """Write the checkpoint, if there is to be one."""
        if self.args.save is not None:
            self.state.save(self.args.save, as_argv(self.args, THIS_TIME))
            self.signals.saved = f"step {self.state.step} is saved in {self.args.save}"

    def train(self):
        """Train to the end, or to a signal."""
        args, state, first = self.args, self.state, self.state.step
        workers = Workers(args.workers, args.engine, state.config) if args.workers > 1 else None
        self.engine = use_engine(args.engine)
        compute = workers or partial(loss_and_grads, self.engine, state.config)
        optimizer = OPTIMIZERS[args.optimizer]
        if args.clip_grad is not None:
            optimizer = clipped(optimizer, args.clip_grad)
        settings = {name: getattr(args, name) for name in ("beta1", "beta2", "eps", "weight_decay")}
        plan = self.batches(args.batch_size), args.steps, self.rate_at, optimizer, first
        training = train(compute, state.weights, state.m, state.v, *plan, **settings)
        if args.trace:
            training = traced(training, args.trace, state, self.rate_at)
        self.signals.training = True
        try:
            self.watch(training)
        except Halt as reason:
            self.save()
            raise UserError(f"{reason}; {self.signals.saved}") from None
        finally:
            if args.plot:
                self.plot()
        if state.step == first and args.save != args.resume:  # there was no step to save
            self.save()
        self.signals.training = False
        if self.signals.caught:
            raise KeyboardInterrupt

    def watch(self, training):
        """Go through the steps: print the losses and what else was asked for, save now and then."""
        args, state = self.args, self.state
        start, first, before, shown = time.monotonic(), state.step, state.seen, 0.0
        for step, loss, _, batch in training:
            state.step = step = step + 1
            state.seen += predictions(batch)
            if args.plot:
                self.losses.append((step, loss))
            print(f"step {step:4d} / {args.steps:4d} | loss {loss:.4f}", end="\r")
            if not math.isfinite(loss):
                raise UserError(f"the loss of step {step} is {loss}: try a lower --lr")
            state.recent = state.recent[0] + loss, state.recent[1] + 1
            if self.held_out and (step % args.eval_every == 0 or step == args.steps):
                (total, number), state.recent = state.recent, (0.0, 0)
                self.validations.append((step, mean_loss(self.engine, state.config, state.weights, self.held_out)))
                judge(args, step, total / number, self.validations[-1][1])
            if args.gen_every and step % args.gen_every == 0:
                print(f"\nsample at step {step}: {self.sample_text(random.Random(step))}")
            if step % args.save_every == 0 or step == args.steps or self.signals.caught:
                self.save()
            if self.signals.caught:
                break
            seconds = time.monotonic() - start
            if sys.stderr.isatty() and seconds > shown + 0.2:
                speed = (step - first) / seconds
                shown, left = seconds, round((args.steps - step) / speed)
                rates = f"{speed:.3g} steps/s, {(state.seen - before) / seconds:.0f} tokens/s"
                print(f"\x1b[34C{rates}, {left // 60}:{left % 60:02d} left\x1b[K", end="\r", file=sys.stderr)

    def plot(self):
        """Draw the losses of this run."""
        title = " ".join(["microgpt", *as_argv(self.args, THIS_TIME)])
        rates = [(step, self.rate_at(step - 1)) for step, _ in self.losses]
        with replacing(self.args.plot) as file:
            file.write(loss_plot(title, self.losses, self.validations, rates).encode())

    def show(self):
        """Print the samples and what --explain asks for."""
        args, state = self.args, self.state
        print()
        if args.samples:
            print(f"--- inference (new, hallucinated {'text' if args.stream else 'names'}) ---")
        for i in range(args.samples):
            print(f"sample {i + 1:2d}: {self.sample_text(state.rng)}")
        if args.explain is not None:
            blocks = "utf" in (sys.stdout.encoding or "").lower()
            ids = self.text[: args.context + 1]
            print(*explain(state.config, state.weights, state.tokenizer, ids, blocks), sep="\n")

def main(argv=None):
    """Run the command line. Returns its exit status."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # None: closed from the start
        if hasattr(stream, "reconfigure"):  # a character that a terminal lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    signals, message, status = Signals(), None, 0
    gc.disable()  # nothing here makes reference cycles, so the collector would find nothing
    try:
        try:
            run = Run(*parse_args(argv), signals)
            if run.args.autotune:
                autotune(run.args, run.state, run.batches)
            else:
                run.train()
                run.show()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        message, status = f"interrupted: {signals.saved}", 128 + signals.caught
    except UserError as error:
        message, status = f"error: {error}", error.status
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or else Python tries again at its end
        status = 1
        if not isinstance(error, BrokenPipeError):  # whoever read the output has gone, as `head` does
            message = f"error: cannot write the output: {error.strerror}"
    except MemoryError:
        message, status = "error: there is not enough memory for this corpus and model", 1
    signals.caught, signals.training = 0, argv is None  # at the end of the program a signal changes nothing
    if message:
        message = "".join(char if char.isprintable() else " " for char in f"microgpt: {message}")
        try:
            print("\n" * sys.stderr.isatty() + message, file=sys.stderr, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return status

if __name__ == "__main__":
    sys.exit(main())
