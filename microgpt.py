#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A GPT in one file of pure Python, to be read from top to bottom.

    python microgpt.py            learn the names in input.txt, then invent new ones
    python microgpt.py --help     everything else it can do

A GPT (generative pretrained transformer) reads a text piece by piece and, at each point, gives a probability
to every piece that may come next. Training is the search for numbers that make those guesses good. The file
has three parts, and you can stop after any of them with something complete in hand:

    Part one    the complete algorithm, one number at a time               sections 1 to 8
    Part two    the same, much faster: matrices, subwords, GPU, cores      sections 9 to 13
    Part three  a tool for every day                                       sections 14 to 18

On the same input.txt, it prints the same numbers as the reference, microgpt by Andrej Karpathy.
"""

# PART ONE: THE COMPLETE ALGORITHM =========================================================================

import math, random
from dataclasses import dataclass

# 1. Dataset -----------------------------------------------------------------------------------------------
# A language model learns from documents, here names; they could just as well be verse or games of chess. Put
# your own in input.txt, one per line, and the model learns to write more of them.

def read_documents(path):
    """Return the lines of a UTF-8 text file, stripped, without the blank ones."""
    with open(path, encoding="utf-8-sig") as file:  # -sig: skip a byte-order mark
        lines = [line.strip() for line in file]
    return [line for line in lines if line]

# 2. Characters --------------------------------------------------------------------------------------------
# The model works with tokens, the pieces of a text, here its characters. Every token has a number, its id: in
# sorted order the characters get 0, 1, 2, ... The last id is BOS ("beginning of sequence"). It stands before
# and after every document, so that the model can learn how names begin and when to stop. With the 26 letters,
# "emma" becomes [26, 4, 12, 12, 0, 26].

class CharTokenizer:
    """Give an id to each distinct character in the documents, and the last id to BOS."""
    def __init__(self, docs):
        self.tokens = sorted(set("".join(docs)))
        self.ids = {char: i for i, char in enumerate(self.tokens)}
        self.bos, self.vocab_size = len(self.tokens), len(self.tokens) + 1

    def encode(self, text):
        """Return the ids of a text. Raises KeyError for a character that no document has."""
        return [self.ids[char] for char in text]

    def decode(self, ids):
        """Return the text of some ids, leaving out BOS."""
        return "".join(self.tokens[i] for i in ids if i != self.bos)

# 3. Autograd on one number --------------------------------------------------------------------------------
# Training changes the weights, the numbers that the model computes with, to lower the loss, one number that
# says how surprised the model was by what came next. The derivative of the loss with respect to a weight is
# its gradient: if it is 2, raising the weight by 0.001 adds about 0.002 to the loss. Autograd finds them all.
#
# For that, numbers must remember where they came from. A Value holds a number (data), the Values that it was
# computed from (inputs), and how fast it changes with each of them (slopes). The slopes of a * b are b and a;
# the slopes of a + b are 1 and 1. Take a = 2, b = 3 and c = a * b + a, with the slope written on each arrow:
#
#     b = 3 ---- 2 ---.
#                      > a * b = 6 ---- 1 ---.
#     a = 2 ---- 3 ---'                       > c = 8
#       '--------------- 1 -------------------'
#
# The chain rule: multiply the slopes along each path, and add up the paths. From b to c there is one path:
# 2 * 1 = 2. From a there are two: 3 * 1 + 1 = 4. Indeed, with a = 2.001, c becomes 8.004.

class Value:
    """A number that remembers what it was computed from. After backward(), grad is its gradient."""
    __slots__ = "data", "grad", "inputs", "slopes"  # no other attributes, which saves memory
    def __init__(self, data, inputs=(), slopes=()):
        self.data, self.grad = data, 0.0
        self.inputs, self.slopes = inputs, slopes
        if inputs:
            tape.append(self)  # explained below

    def __add__(self, other):
        if isinstance(other, Value):
            return Value(self.data + other.data, (self, other), (1.0, 1.0))
        return Value(self.data + other, (self,), (1.0,))

    def __mul__(self, other):
        if isinstance(other, Value):
            return Value(self.data * other.data, (self, other), (other.data, self.data))
        return Value(self.data * other, (self,), (other,))

    def __pow__(self, k):  # k is a plain number, and the slope of a^k is k a^(k-1)
        return Value(self.data**k, (self,), (k * self.data ** (k - 1),))

    def exp(self):  # its own slope; that of log(a) is 1/a
        e = math.exp(self.data)
        return Value(e, (self,), (e,))
    def log(self): return Value(math.log(self.data), (self,), (1 / self.data,))
    def relu(self): return Value(max(0.0, self.data), (self,), (1.0 if self.data > 0 else 0.0,))

    # The rest are built on these.
    def __neg__(self): return self * -1
    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other**-1
    def __rtruediv__(self, other): return self**-1 * other

    def backprop(self):
        """Pass grad times slope to each input."""
        for value, slope in zip(self.inputs, self.slopes):
            value.grad += slope * self.grad

# Every result goes on one list, the tape (Wengert 1964), as soon as it is computed, so it comes after what it
# was computed from. Reading the tape from its end, we meet a Value only when all its paths are added up.
tape = []

def backward(loss):
    """Compute d(loss)/d(x) for every x behind the loss, and add it to x.grad. This empties the tape, so a
    second call finds nothing to do."""
    loss.grad = 1.0  # it changes one to one with itself
    while tape:
        tape.pop().backprop()

# 4. The operations of a GPT, spelled out in Values --------------------------------------------------------
# A GPT needs seven operations on matrices: embed, +, linear, rmsnorm, relu, attention, cross_entropy. In a
# matrix x of activations, the numbers computed from a text, each row is a position in the text, and the
# numbers in it are its channels: x[row][channel]. In a matrix of weights, a row makes one output: w[out][in].
# Until the loss, rows meet only in attention: it is how the past gets into the present.

def add_up(values):
    """Return the sum of some Values, as one operation with slope 1 for each of them."""
    return Value(sum([v.data for v in values]), values, [1.0] * len(values))

def dot(a, b):
    """Return the dot product of two rows: a[0] * b[0] + a[1] * b[1] + ..."""
    return add_up([x * y for x, y in zip(a, b)])

def softmax(scores):
    """Turn scores into probabilities: e^a for each score a, divided by the sum of them all."""
    top = max(a.data for a in scores)  # subtracting it changes no probability, and now e^a cannot overflow
    exps = [(a - top).exp() for a in scores]
    total = add_up(exps)
    return [e / total for e in exps]

class Matrix:
    """Rows of Values. The operations leave their matrices as they are and return a new one."""
    def __init__(self, rows):
        self.rows = rows

    @staticmethod
    def wrap(rows): return Matrix([[Value(a) for a in row] for row in rows])  # of plain numbers
    @property
    def data(self): return [[a.data for a in row] for row in self.rows]
    @property
    def grad(self): return [[a.grad for a in row] for row in self.rows]

    def embed(self, ids):
        """Look up the row of each id: its embedding, learned numbers that stand for a token or a position."""
        return Matrix([self.rows[i] for i in ids])

    def __add__(self, other):
        return Matrix([[a + b for a, b in zip(x, y)] for x, y in zip(self.rows, other.rows)])

    def linear(self, w):
        """Make a weighted sum of all channels of a row for each output: out[o] = dot(row, w[o])."""
        return Matrix([[dot(row, weights) for weights in w.rows] for row in self.rows])

    def rmsnorm(self):
        """Divide each row by its root mean square, so that all rows have the same scale, whatever came
        before. The 1e-5 avoids a division by zero. (Zhang, Sennrich 2019)"""
        out = []
        for row in self.rows:
            scale = (dot(row, row) / len(row) + 1e-5) ** -0.5
            out.append([a * scale for a in row])
        return Matrix(out)

    def relu(self):
        """Turn negative numbers into 0 (rectified linear unit). Without it, two linears would act as one."""
        return Matrix([[a.relu() for a in row] for row in self.rows])

    def attention(self, k, v, n_head, caches):
        """Let each row gather information from itself and earlier rows of its document. (Vaswani et al. 2017)

        A row has a query (what it looks for), a key (how it is found) and a value (what it hands on). The dot
        product of a query and a key is a score. Softmax turns the scores into shares, and the result is the
        sum of the values, each times its share. Each of n_head heads does this with `size` channels of its
        own, so that a position can look for several things. Scores grow with the size, hence the division by
        its root. self, k and v hold queries, keys and values. caches[t] is (keys, values) of row t's document
        so far, shown in section 5. Each position adds its own key and then asks, so none sees the future."""
        size, out = len(self.rows[0]) // n_head, []
        for t, (keys, values) in enumerate(caches):
            keys.append(k.rows[t])
            values.append(v.rows[t])
            mixed = []
            for start in range(0, n_head * size, size):
                head = slice(start, start + size)
                scores = [dot(self.rows[t][head], key[head]) / math.sqrt(size) for key in keys]
                shares = softmax(scores)
                for channel in range(start, start + size):
                    mixed.append(dot(shares, [value[channel] for value in values]))
            out.append(mixed)
        return Matrix(out)

    def cross_entropy(self, targets):
        """Return the loss, a Value: the mean over the rows of -log p of the token that really came next. Rows
        are logits, a score for each token, and p is their softmax. -log p is 0 if the model is certain and
        right, log(vocab_size) if it finds all tokens equally likely. The logarithm turns the chance of a
        text, the product of its tokens' chances, into a sum. As log(sum of e^a) - a[target] it never
        meets log 0."""
        losses = []
        for row, target in zip(self.rows, targets):
            top = max(a.data for a in row)
            total = add_up([(a - top).exp() for a in row])
            losses.append(total.log() + top - row[target])
        return add_up(losses) / len(losses)

# 5. GPT ---------------------------------------------------------------------------------------------------
# A row begins as the embedding of its token plus that of its position. Each layer then changes it twice, by
# attention and by an MLP (multilayer perceptron: two linear operations with a relu between them). Both add to
# the row instead of replacing it: x becomes x + f(x), with a slope of 1 plus the slope of f, so the gradient
# has a direct way back to the first layer. At the end, lm_head turns each row into logits.

@dataclass(frozen=True)
class Config:
    """The shape of a model. n_head must divide n_embd."""
    vocab_size: int
    n_layer: int = 1
    n_embd: int = 16      # channels in a row
    n_head: int = 4       # attention heads in a layer
    block_size: int = 16  # the most positions that the model can see

def shapes(config):
    """Return name -> (rows, columns) for each weight matrix, in the order they are drawn."""
    d = config.n_embd
    # the embeddings of tokens and of positions, and the head of the language model:
    out = {"wte": (config.vocab_size, d), "wpe": (config.block_size, d), "lm_head": (config.vocab_size, d)}
    for i in range(config.n_layer):
        for name in ("attn_wq", "attn_wk", "attn_wv", "attn_wo"):  # of queries, keys, values, output
            out[f"layer{i}.{name}"] = (d, d)
        out[f"layer{i}.mlp_fc1"] = (4 * d, d)  # fully connected, to 4 d hidden channels by convention
        out[f"layer{i}.mlp_fc2"] = (d, 4 * d)  # and back
    return out

def initial_weights(config, rng):
    """Return name -> rows of random (normal) floats, because equal weights would get equal gradients."""
    weights = {}
    for name, (rows, columns) in shapes(config).items():
        weights[name] = [[rng.gauss(0, 0.08) for _ in range(columns)] for _ in range(rows)]
    return weights

# Rows of several documents go through the model together, which pays off in part two. Only attention must
# know which rows belong together, so each row brings the cache of its document along. With "em" and "al":
#
#     ids          BOS  e   m   BOS  a   l
#     positions     0   1   2    0   1   2
#     caches        A   A   A    B   B   B
#
# caches[row][layer] is (keys, values), and the rows of a document share the same two lists.

def new_cache(config):
    """Return what the model remembers of one document: for each layer, the keys and the values so far."""
    return [([], []) for _ in range(config.n_layer)]

def gpt(config, w, ids, positions, caches):
    """Return the logits, rows x vocab_size: scores for the token that follows each row's token."""
    x = w["wte"].embed(ids) + w["wpe"].embed(positions)             # rows x n_embd
    x = x.rmsnorm()  # the layers normalize only copies of x; this scales x itself
    for i in range(config.n_layer):
        # 1. Attention: what does this position want to know from those before it?
        normed = x.rmsnorm()
        q = normed.linear(w[f"layer{i}.attn_wq"])
        k = normed.linear(w[f"layer{i}.attn_wk"])
        v = normed.linear(w[f"layer{i}.attn_wv"])
        found = q.attention(k, v, config.n_head, [cache[i] for cache in caches])
        x = x + found.linear(w[f"layer{i}.attn_wo"])
        # 2. MLP: what follows from it?
        hidden = x.rmsnorm().linear(w[f"layer{i}.mlp_fc1"]).relu()  # rows x 4 n_embd
        x = x + hidden.linear(w[f"layer{i}.mlp_fc2"])               # rows x n_embd
    return x.linear(w["lm_head"])                                   # rows x vocab_size

# 6. Adam --------------------------------------------------------------------------------------------------
# A gradient says where the loss grows, so a weight must move the other way. The learning rate lr sets how
# far. For each weight, Adam (Kingma, Ba 2015) keeps two running means, m of its gradient and v of the
# gradient's square, and moves it by lr * m / sqrt(v). While the gradient keeps its sign, that is about lr,
# however large the gradient. Where the sign keeps changing, m is near 0, and the weight hardly moves. beta1
# and beta2 say how slowly the means forget; eps avoids a division by 0.

def zeros(weights):
    """Return rows of zeros, shaped like the weights."""
    return {name: [[0.0] * len(row) for row in rows] for name, rows in weights.items()}

def adam(weights, grads, m, v, step, lr, beta1=0.85, beta2=0.99, eps=1e-8):
    """Move the weights and their running means by one step, in place. Steps count from 0."""
    m_share = 1 - beta1 ** (step + 1)  # the means began at 0, so at first they are too small by these factors
    v_share = 1 - beta2 ** (step + 1)
    for name in weights:
        for row, g, mean, square in zip(weights[name], grads[name], m[name], v[name]):
            for i in range(len(row)):
                mean[i] = beta1 * mean[i] + (1 - beta1) * g[i]
                square[i] = beta2 * square[i] + (1 - beta2) * g[i] ** 2
                m_hat = mean[i] / m_share
                v_hat = square[i] / v_share
                row[i] -= lr * m_hat / (math.sqrt(v_hat) + eps)

# 7. Training and sampling ---------------------------------------------------------------------------------
# To train on a document, the model guesses the next token at all positions at once. To sample a new one, it
# reads BOS, draws a token by its probability, reads that, and so on until it draws BOS. Dividing the logits
# by a temperature below 1 makes likely tokens likelier.

def mean_loss(config, w, batch, model=gpt):
    """Return the mean loss over all predictions in a batch, which is a list of documents as lists of ids."""
    ids, positions, caches, targets = [], [], [], []
    for tokens in batch:
        cache = new_cache(config)  # shared by all rows of this document
        for position in range(len(tokens) - 1):
            ids.append(tokens[position])          # in:   BOS  e  m  m  a
            targets.append(tokens[position + 1])  # out:   e   m  m  a  BOS
            positions.append(position)
            caches.append(cache)
    return model(config, w, ids, positions, caches).cross_entropy(targets)

def loss_and_grads(config, weights, batch, engine=Matrix, model=gpt):
    """Return the mean loss of a batch, and name -> rows of gradients. The engine is the type of matrix that
    wraps the weights, anew for each call. Part two has faster engines, part three another model."""
    w = {name: engine.wrap(rows) for name, rows in weights.items()}
    loss = mean_loss(config, w, batch, model)
    backward(loss)
    return loss.data, {name: matrix.grad for name, matrix in w.items()}

def sample(config, weights, bos, temperature, rng):
    """Return the ids of a new document, at most block_size of them."""
    w = {name: Matrix.wrap(rows) for name, rows in weights.items()}
    out, token, cache = [], bos, new_cache(config)
    for position in range(config.block_size):
        logits = gpt(config, w, [token], [position], [cache]).data[0]
        tape.clear()  # nobody will ask for gradients
        top = max(logits)
        odds = [math.exp((a - top) / temperature) for a in logits]  # choices() divides them by their sum
        token = rng.choices(range(len(odds)), weights=odds)[0]
        if token == bos:
            break
        out.append(token)
    return out

# 8. All of it ---------------------------------------------------------------------------------------------
# With a call of train_and_sample(), the code so far runs alone. The loss begins near log 27 = 3.3, a blind
# guess, and ends near 2.3. It is that of one name at a time, so look at the trend.

def train_and_sample(path="input.txt", steps=1000):
    """Train a model on the documents in a file, then print 20 new ones."""
    rng = random.Random(42)
    docs = read_documents(path)
    rng.shuffle(docs)
    print(f"num docs: {len(docs)}")
    tokenizer = CharTokenizer(docs)
    print(f"vocab size: {tokenizer.vocab_size}")
    config = Config(tokenizer.vocab_size)
    weights = initial_weights(config, rng)
    print(f"num params: {sum(len(rows) * len(rows[0]) for rows in weights.values())}")
    m, v = zeros(weights), zeros(weights)
    for step in range(steps):
        doc = docs[step % len(docs)]
        tokens = [tokenizer.bos] + tokenizer.encode(doc) + [tokenizer.bos]
        batch = [tokens[: config.block_size + 1]]  # one document; its last token is only a target
        loss, grads = loss_and_grads(config, weights, batch)
        lr = 0.01 * (1 - step / steps)  # large steps at first, small ones at the end
        adam(weights, grads, m, v, step, lr)
        print(f"step {step + 1:4d} / {steps:4d} | loss {loss:.4f}", end="\r")
    print("\n--- inference (new, hallucinated names) ---")
    for i in range(20):
        ids = sample(config, weights, tokenizer.bos, 0.5, rng)
        print(f"sample {i + 1:2d}: {tokenizer.decode(ids)}")

# PART TWO: EFFICIENCY =====================================================================================

import atexit, concurrent.futures, gc, multiprocessing, os, signal, sys, threading
from collections import Counter
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, compress, islice
from operator import add, mul

class UserError(RuntimeError):
    """A problem that the user can fix, told in one line."""

def require(condition, what, error=UserError):
    """Raise an error that says what is wrong, unless the condition holds."""
    if not condition:
        raise error(what)

# 9. The same operations, a matrix at a time ---------------------------------------------------------------
# Part one makes an object per multiplication. A Tensor holds the numbers of a whole matrix instead, and
# each operation puts one object on the tape. In place of slopes it has a rule, a function that takes g, the
# gradient of the result, and passes on the gradients of the inputs. The comment above each operation derives
# its rule. Names, arguments and numbers are those of part one, so gpt() works with either kind of matrix.
#
# The product of two matrices takes the rows of the first and the columns of the second, and each number in it
# is the dot product of a row and a column. The columns of W^T are the rows of W: X W^T is matmul(x, w).

sumprod = getattr(math, "sumprod", lambda a, b: sum(map(mul, a, b)))  # math has it from Python 3.12 on

def transpose(rows):
    return list(zip(*rows))

def add_rows(x, y):
    return [list(map(add, a, b)) for a, b in zip(x, y)]

def probabilities(scores):
    """Return the softmax of floats."""
    top = max(scores)
    exps = [math.exp(a - top) for a in scores]
    total = sum(exps)
    return [e / total for e in exps]

class Tensor:
    """A matrix. data is rows of floats (of a loss, one float); grad, at first None, has the same shape."""
    def __init__(self, data, rule=None):
        self.data, self.grad, self.rule = data, None, rule
        if rule:
            tape.append(self)

    @classmethod
    def wrap(cls, rows): return cls(rows)
    def result(self, data, rule): return type(self)(data, rule)
    def backprop(self): self.rule(self.grad)

    def receive(self, grad):
        """Add to the gradient. Rows already received never change, since others may hold them."""
        self.grad = grad if self.grad is None else add_rows(self.grad, grad)

    @staticmethod
    def matmul(rows, columns):
        """Return the product of two matrices, the first given by its rows and the second by its columns."""
        return [[sumprod(row, column) for column in columns] for row in rows]

    @classmethod
    def matmuls(cls, many_rows, many_columns): return list(map(cls.matmul, many_rows, many_columns))

    # A row of the table goes wherever its id is, so its gradient is the sum of theirs.
    def embed(self, ids):
        def rule(g):
            grad = [[0.0] * len(g[0])] * len(self.data)  # one shared row: rows are replaced, never changed
            for i, row in zip(ids, g):
                grad[i] = list(map(add, grad[i], row))
            self.receive(grad)
        return self.result([self.data[i] for i in ids], rule)

    # y = x + z: both slopes are 1, so both get g.
    def __add__(self, other):
        def rule(g):
            self.receive(g)
            other.receive(g)
        return self.result(add_rows(self.data, other.data), rule)

    # y[t][o] is the sum over i of w[o][i] x[t][i], that is Y = X W^T. x[t][i] goes into y[t][o] for every o,
    # with slope w[o][i]: dX = g W. w[o][i] goes into y[t][o] for every t, with slope x[t][i]: dW = g^T X.
    def linear(self, w):
        def rule(g):
            self.receive(self.matmul(g, transpose(w.data)))
            w.receive(self.matmul(transpose(g), transpose(self.data)))
        return self.result(self.matmul(self.data, w.data), rule)

    # y = s x, where s = (x.x / n + 1e-5)^(-1/2) has the slope -s^3 x / n. So dx = s g - s^3 x (g.x) / n, and
    # as s x = y, that is s (g - y (g.y) / n).
    def rmsnorm(self):
        scales = [(sumprod(row, row) / len(row) + 1e-5) ** -0.5 for row in self.data]
        y = [[a * scale for a in row] for row, scale in zip(self.data, scales)]
        def rule(g):
            out = []
            for g_row, y_row, scale in zip(g, y, scales):
                mean = sumprod(g_row, y_row) / len(y_row)
                out.append([scale * (a - mean * b) for a, b in zip(g_row, y_row)])
            self.receive(out)
        return self.result(y, rule)

    # The slope of max(0, x) is 1 where x is positive and 0 elsewhere.
    def relu(self):
        def rule(g):
            self.receive([[b if a > 0 else 0.0 for a, b in zip(x, y)] for x, y in zip(self.data, g)])
        return self.result([[a if a > 0 else 0.0 for a in row] for row in self.data], rule)

    # For each document and head, y = P V, where P is the softmax of S = Q K^T / sqrt(size). As in linear,
    # dV = P^T g and dP = g V^T, and up to sqrt(size), dQ = dS K and dK = dS^T Q. For the softmax: raising
    # s[i] by h raises p[i] by h p[i], and making the sum 1 again lowers every p[j] by h p[j] p[i]. So ds[i]
    # is p[i] (dp[i] - the sum of all p[j] dp[j]). The rows of a document must stand together. The rule is for
    # caches that were empty before; only sampling goes on from earlier calls.
    def attention(self, k, v, n_head, caches):
        size = len(self.data[0]) // n_head
        root = math.sqrt(size)
        heads = [slice(start, start + size) for start in range(0, n_head * size, size)]
        starts = [t for t in range(len(caches)) if t == 0 or caches[t] is not caches[t - 1]]
        spans = [slice(start, end) for start, end in zip(starts, starts[1:] + [len(caches)])]  # of documents

        def split(many):  # rows of each document -> a matrix for each document and head
            return [[row[head] for row in rows] for rows in many for head in heads]
        def join(parts):  # and back to one matrix
            documents = [parts[i : i + n_head] for i in range(0, len(parts), n_head)]
            return [list(chain(*rows)) for document in documents for rows in zip(*document)]
        def scaled(rows):
            return [[a / root for a in row] for row in rows]
        for span in spans:
            keys, values = caches[span.start]
            keys += k.data[span]
            values += v.data[span]
        qs = split([scaled(self.data[span]) for span in spans])  # each: rows x size
        ks = split([caches[start][0] for start in starts])       # each: (past + rows) x size
        vs = split([caches[start][1] for start in starts])
        ps = []
        for scores in self.matmuls(qs, ks):                      # each: rows x (past + rows)
            past = len(scores[0]) - len(scores)
            shares = [probabilities(row[: past + t + 1]) for t, row in enumerate(scores)]  # no future
            ps.append([row + [0.0] * (past + len(scores) - len(row)) for row in shares])
        def rule(g):
            gs = split([g[span] for span in spans])
            dss = []
            for p, dp in zip(ps, self.matmuls(gs, vs)):
                means = map(sumprod, p, dp)
                dss.append([[a * (da - mean) for a, da in zip(x, dx)] for x, dx, mean in zip(p, dp, means)])
            dqs = self.matmuls(dss, map(transpose, ks))
            dks = self.matmuls(map(transpose, dss), map(transpose, qs))
            dvs = self.matmuls(map(transpose, ps), map(transpose, gs))
            self.receive(scaled(join(dqs)))
            k.receive(join(dks))
            v.receive(join(dvs))
        out = self.result(join(self.matmuls(ps, map(transpose, vs))), rule)
        out.shares = ps  # for --explain
        return out

    # dz = (p - 1 at the target, p elsewhere) / n: log(sum of e^z) has the slopes p, and -z[target] has -1.
    def cross_entropy(self, targets):
        loss = 0.0
        for row, target in zip(self.data, targets):
            top = max(row)
            loss += math.log(sum([math.exp(a - top) for a in row])) + top - row[target]
        def rule(g):
            grad = [[g * p / len(targets) for p in probabilities(row)] for row in self.data]
            for row, target in zip(grad, targets):
                row[target] -= g / len(targets)
            self.receive(grad)
        return Tensor(loss / len(targets), rule)

# 10. Faster products --------------------------------------------------------------------------------------
# Nearly all the time goes to dot products, and there to the interpreter's loop rather than to arithmetic. So
# the loop is written out: for vectors of length 3, Python compiles a0*b0+a1*b1+a2*b2, once. And behind a relu
# most numbers are 0, in a trained model six out of seven. A product with such a matrix leaves them out.

WRITTEN_OUT = 16 if hasattr(math, "sumprod") else 257  # from this length on, sumprod does it

@lru_cache(maxsize=None)
def products(n):
    """Return a matmul for rows and columns of length n."""
    if n >= WRITTEN_OUT or n > 64 and n % 64:  # others pass quickly in a growing text
        return Tensor.matmul
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

def mostly_zeros(rows):
    """Tell if more than half of the numbers are 0. Usually, two rows suffice to rule it out."""
    some = 0.0 in rows[0] or 0.0 in rows[-1]
    return some and 2 * sum(row.count(0.0) for row in rows) > len(rows) * len(rows[0])

class FastTensor(Tensor):
    """The engine `tensor`: a Tensor with faster products."""
    @staticmethod
    def matmul(rows, columns):
        """Return what Tensor.matmul does, with products written out or zeros left out."""
        if not mostly_zeros(rows):
            if mostly_zeros(columns):
                return transpose(FastTensor.matmul(columns, rows))  # A B = (B^T A^T)^T
            return products(len(rows[0]))(rows, columns)
        out, inner = [], transpose(columns)
        for row in rows:  # where n numbers are not 0, n terms remain of each dot product
            numbers, kept = [*compress(row, row)], compress(inner, row)
            out += products(len(numbers))([numbers], zip(*kept)) if numbers else [[0.0] * len(columns)]
        return out

def rows_of(*dictionaries):
    """Yield the rows that belong together in weights, gradients, running means."""
    for name in dictionaries[0]:
        yield from zip(*[each[name] for each in dictionaries])

def fast_adam(weights, grads, m, v, step, lr, beta1=0.85, beta2=0.99, eps=1e-8, **_):
    """Do what adam does, with all that is the same for every weight computed once: dividing m by d and v by
    c^2 is the same as multiplying lr by c / d and eps by c."""
    new1, new2, sqrt = 1 - beta1, 1 - beta2, math.sqrt
    c, d = sqrt(1 - beta2 ** (step + 1)), 1 - beta1 ** (step + 1)
    lr = lr * c / d
    eps *= c
    for w, g, mean, square in rows_of(weights, grads, m, v):
        for i, gi in enumerate(g):
            mean[i] = mi = beta1 * mean[i] + new1 * gi
            square[i] = vi = beta2 * square[i] + new2 * gi * gi
            w[i] -= lr * mi / (sqrt(vi) + eps)

# 11. Subwords ---------------------------------------------------------------------------------------------
# Characters are few, and each says little. Byte-pair encoding (Gage 1994; Sennrich et al. 2016) makes longer
# tokens: the pair of neighbors that occurs most often becomes a token of its own, again and again. In
# "banana" the pairs are ba (once), an (twice) and na (twice). On a tie the smaller pair wins, here an, and
# the text becomes b [an] [an] a, in which no pair occurs twice. A token may hold spaces, such as " of the ".
#
# The tokens of a text are kept as a string of chr(id), so that Python's own split finds all places of a pair,
# from left to right. In aaa the pair aa is counted twice, though only one can be replaced. Counting all pairs
# anew for every merge would take tens of times as long, so only the counts next to a replaced pair are
# corrected. The most frequent pair is on top of a heap. A pair goes on the heap when its count has risen;
# where it has fallen, the entry is too high, comes up too early, and is then put back with the right count.

BETWEEN = chr(0x10FFFF)  # stands between documents and is part of no pair

def learn_merges(docs, n, first_id):
    """Return the first n merges, (left id, right id), of strings of chr(id). Their ids begin at first_id."""
    text, merges = BETWEEN.join(docs), []
    counts = Counter(pair for pair in map(add, text, text[1:]) if BETWEEN not in pair)
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapify(heap)
    while heap and len(merges) < n:
        count, pair = heappop(heap)
        if -count != counts[pair]:  # it has fallen since
            if counts[pair] > 1:
                heappush(heap, (-counts[pair], pair))
            continue
        left, right, merged = *pair, chr(first_id + len(merges))
        merges.append((ord(left), ord(right)))
        pieces = text.split(pair)
        text = merged.join(pieces)
        touching = pieces[1:-1].count("")  # how often two of the pair stand side by side
        changes = Counter({merged + merged: touching, right + left: -touching})
        for char, times in Counter(piece[-1] for piece in pieces[:-1] if piece).items():
            changes[char + left] -= times
            changes[char + merged] += times
        for char, times in Counter(piece[0] for piece in pieces[1:] if piece).items():
            changes[right + char] -= times
            changes[merged + char] += times
        for other, change in changes.items():
            if BETWEEN not in other:
                counts[other] += change
                if change > 1:  # a pair with the new token; no other count rises
                    heappush(heap, (-change, other))
        counts[pair] = 0
    return merges

class BPETokenizer(CharTokenizer):
    """A CharTokenizer with one more token for each merge. BOS stays the last id."""
    def __init__(self, docs, merges):
        super().__init__(docs)
        self.merges = merges
        for left, right in merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])
        self.bos, self.vocab_size = len(self.tokens), len(self.tokens) + 1

    def merge(self, docs):
        """Return documents as strings of chr(id), after the merges, made in the order they were learned."""
        for char in sorted(set("".join(docs))):
            require(char in self.ids, f"no document has the character {char!r}, so the model cannot know it")
        text = BETWEEN.join(["".join([chr(self.ids[char]) for char in doc]) for doc in docs])
        for new, (left, right) in enumerate(self.merges, len(self.ids)):
            text = text.replace(chr(left) + chr(right), chr(new))
        return text.split(BETWEEN) if docs else []

    def encode(self, text):
        """Return the ids of a text. Raises UserError for a character that no document has."""
        return list(map(ord, self.merge([text])[0]))

# 12. The GPU ----------------------------------------------------------------------------------------------
# A GPU multiplies thousands of numbers at once, but they must travel there and back. So the engine vulkan
# sends only the large products, through vulkan_gemm.py, a second file that works with any vendor's GPU. At
# the start it measures how large a product must be to gain from it.

@lru_cache(maxsize=None)
def gpu_matmuls():
    """Return a matmuls that uses the GPU where that is faster. Raises RuntimeError if there is no GPU."""
    try:
        from vulkan_gemm import VulkanGemm, offload
    except ImportError:
        raise UserError("--vulkan needs vulkan_gemm.py beside microgpt.py") from None
    gpu = VulkanGemm()
    atexit.register(gpu.close)
    return offload(gpu, FastTensor.matmuls)

class VulkanTensor(FastTensor):
    """The engine `vulkan`: a FastTensor with its large products on the GPU."""
    @classmethod
    def matmul(cls, rows, columns): return cls.matmuls([rows], [columns])[0]
    @classmethod
    def matmuls(cls, many_rows, many_columns): return gpu_matmuls()(list(many_rows), list(many_columns))

ENGINES = {"scalar": Matrix, "tensor": FastTensor, "vulkan": VulkanTensor}

# 13. All the cores ----------------------------------------------------------------------------------------
# All workers have the same weights. Each computes the gradients for its share of the batch. Their mean,
# weighted by the number of predictions in each share, is the gradient of the whole batch. Python runs one
# thread at a time, so the workers are processes, from a pool in the standard library. Only this process moves
# the weights.

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

def start_worker():
    """Set up a worker: it leaves signals to its parent and ends when the parent does."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # signals to the parent's group do not come here, so SIGTERM is the pool's own
    threading.Thread(target=end_with_parent, daemon=True).start()

def end_with_parent():
    """Wait until the parent process ends, however it does, then end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)

def count_predictions(batch): return sum(len(tokens) - 1 for tokens in batch)  # all but the first tokens

class Workers:
    """Processes that share the work of loss_and_grads. If n is 1, there are none."""
    def __init__(self, n, engine, model=gpt):
        self.n, self.engine, self.model = n, engine, model
        if n > 1:
            context = multiprocessing.get_context("spawn" if engine is VulkanTensor else None)
            self.pool = concurrent.futures.ProcessPoolExecutor(n, context, start_worker)
            self.pool._safe_to_dynamically_spawn_children = False  # PyPy's pool lacks what it would call

    def loss_and_grads(self, config, weights, batch, patience=3600):
        """Return what loss_and_grads does. Raises UserError if a worker dies or takes over `patience` s."""
        if self.n == 1:
            return loss_and_grads(config, weights, batch, self.engine, self.model)
        loss, grads, shares = 0.0, zeros(weights), [batch[i :: self.n] for i in range(self.n)]
        try:
            futures = [self.pool.submit(loss_and_grads, config, weights, share, self.engine, self.model)
                       for share in shares]
            for share, future in zip(shares, futures):
                part = count_predictions(share) / count_predictions(batch)
                share_loss, share_grads = future.result(patience)
                loss += part * share_loss
                for row, share_row in rows_of(grads, share_grads):
                    row[:] = [a + part * b for a, b in zip(row, share_row)]
        except (OSError, RuntimeError, concurrent.futures.TimeoutError) as error:
            for process in multiprocessing.active_children():  # those that are left may hang
                process.kill()
            self.pool.shutdown(wait=False)
            raise UserError(f"a worker cannot go on: {str(error) or 'it does not answer'}") from None
        return loss, grads

    def stop(self):
        """End all workers when they have nothing to do."""
        if self.n > 1:
            self.pool.shutdown()

# PART THREE: A TOOL FOR EVERY DAY =========================================================================

import argparse, json, shutil, struct, time
from contextlib import contextmanager, suppress
from functools import partial
from glob import iglob
from pathlib import Path

# 14. GPT-2 as published -----------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019; --arch gpt2) differs from part one. LayerNorm (Ba, Kiros, Hinton 2016) replaces
# RMSNorm: it also subtracts the mean of each row, and then each channel has a learned factor, the gain, and a
# learned offset, the bias. Each linear layer has a bias, too. The activation is GELU, a ReLU with a soft
# knee. The norm outside the layers comes last, not first. And wte serves as lm_head, so it gets the gradients
# of both uses. Dropout is left out. A gain or a bias is a matrix with one row, which embed() repeats.

# y = x - mean. Every x lowers its whole row by 1/n of itself, so the gradient loses its mean, too.
def center(rows):
    """Subtract its mean from each row, of numbers or Values."""
    means = [sum(row) / len(row) for row in rows]
    return [[a - mean for a in row] for row, mean in zip(rows, means)]

# y = x z, number by number: z is the slope for x, x for z.
def multiply(x, z): return [[a * b for a, b in zip(*rows)] for rows in zip(x, z)]

def multiply_tensor(x, z):
    def rule(g):
        x.receive(multiply(g, z.data))
        z.receive(multiply(g, x.data))
    return x.result(multiply(x.data, z.data), rule)

# y = x (1 + t) / 2, where t = tanh(c (x + k x^3)) has the slope (1 - t^2) c (1 + 3 k x^2).
def gelu(x):
    """Return GELU by its tanh formula (Hendrycks, Gimpel 2016) of a number, and its slope there."""
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = math.tanh(c * (x + k * x * x * x))
    return x * (1 + t) / 2, (1 + t + x * (1 - t * t) * c * (1 + 3 * k * x * x)) / 2

def gelu_matrix(x):
    return Matrix([[Value(gelu(a.data)[0], (a,), gelu(a.data)[1:]) for a in row] for row in x.rows])

def gelu_tensor(x):
    results = [[gelu(a) for a in row] for row in x.data]
    slopes = [[slope for _, slope in row] for row in results]
    return x.result([[y for y, _ in row] for row in results], lambda g: x.receive(multiply(g, slopes)))

def center_tensor(x): return x.result(center(x.data), lambda g: x.receive(center(g)))

Matrix.center, Tensor.center = lambda x: Matrix(center(x.rows)), center_tensor
Matrix.__mul__, Tensor.__mul__ = lambda x, z: Matrix(multiply(x.rows, z.rows)), multiply_tensor
Matrix.gelu, Tensor.gelu = gelu_matrix, gelu_tensor

def gpt2_shapes(config):
    """Return name -> (rows, columns) of each matrix. The gains of the norms are called ln1, ln2 and ln_f."""
    out = shapes(config)
    del out["lm_head"]
    for name, (rows, _) in list(out.items())[2:]:  # not of the embeddings
        out[name + ".bias"] = 1, rows
    for name in [f"layer{i}.{norm}" for i in range(config.n_layer) for norm in ("ln1", "ln2")] + ["ln_f"]:
        out[name] = out[name + ".bias"] = 1, config.n_embd
    return out

def gpt2_weights(config, rng):
    """Return initial weights, smaller for the 2 n_layer matrices whose results are added to x."""
    weights = {}
    for name, (rows, columns) in gpt2_shapes(config).items():
        scale = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith(("attn_wo", "mlp_fc2")) else 0.02
        if name.endswith(".bias") or "ln" in name:
            weights[name] = [[0.0 if name.endswith(".bias") else 1.0] * columns]  # gains begin at 1
        else:
            weights[name] = [[rng.gauss(0, scale) for _ in range(columns)] for _ in range(rows)]
    return weights

def gpt2(config, w, ids, positions, caches):
    """Return the logits, rows x vocab_size, as gpt() does."""
    def repeat(name): return w[name].embed([0] * len(ids))
    def linear(x, name): return x.linear(w[name]) + repeat(name + ".bias")
    def layernorm(x, name): return x.center().rmsnorm() * repeat(name) + repeat(name + ".bias")
    x = w["wte"].embed(ids) + w["wpe"].embed(positions)                         # rows x n_embd
    for i in range(config.n_layer):
        layer = f"layer{i}."
        normed = layernorm(x, layer + "ln1")
        q, k, v = [linear(normed, layer + name) for name in ("attn_wq", "attn_wk", "attn_wv")]
        found = q.attention(k, v, config.n_head, [cache[i] for cache in caches])
        x = x + linear(found, layer + "attn_wo")
        hidden = linear(layernorm(x, layer + "ln2"), layer + "mlp_fc1").gelu()  # rows x 4 n_embd
        x = x + linear(hidden, layer + "mlp_fc2")
    return layernorm(x, "ln_f").linear(w["wte"])

MODELS = {"microgpt": (gpt, shapes, initial_weights), "gpt2": (gpt2, gpt2_shapes, gpt2_weights)}

# 15. Optimizers in historical order -----------------------------------------------------------------------
# Each improves on earlier ones. Stochastic gradient descent takes a step down the slope that a few documents
# show (Robbins, Monro 1951). Momentum keeps going in its previous direction (Polyak 1964). RMSprop divides by
# the size that a weight's gradients had lately (Tieleman, Hinton 2012). Adam (section 6) does both. AdamW
# also pulls each weight toward 0 (Loshchilov, Hutter 2019). All take the same arguments.

def sgd(weights, grads, m, v, step, lr, **_):
    for w, g in rows_of(weights, grads):
        w[:] = [a - lr * b for a, b in zip(w, g)]

def momentum(weights, grads, m, v, step, lr, beta1=0.85, **_):
    for w, g, velocity in rows_of(weights, grads, m):
        for i in range(len(w)):
            velocity[i] = beta1 * velocity[i] + g[i]
            w[i] -= lr * velocity[i]

def rmsprop(weights, grads, m, v, step, lr, beta2=0.99, eps=1e-8, **_):
    for w, g, square in rows_of(weights, grads, v):
        for i in range(len(w)):
            square[i] = beta2 * square[i] + (1 - beta2) * g[i] * g[i]
            w[i] -= lr * g[i] / (math.sqrt(square[i]) + eps)

def adamw(weights, grads, m, v, step, lr, weight_decay=0.01, **settings):
    for (w,) in rows_of(weights):
        w[:] = [a - lr * weight_decay * a for a in w]
    fast_adam(weights, grads, m, v, step, lr, **settings)

OPTIMIZERS = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": fast_adam, "adamw": adamw}

def norm(grads): return math.sqrt(sum(sumprod(row, row) for (row,) in rows_of(grads)))

def clip(grads, limit):
    """Return the gradients, scaled down if their norm, as one vector, exceeds the limit."""
    scale = limit / max(norm(grads), limit)
    return {name: [[g * scale for g in row] for row in rows] for name, rows in grads.items()}

def learning_rate(args, step):
    """Return the learning rate of a step. It rises while the running means are still rough, then falls."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    fall = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1}
    return args.lr * fall[args.schedule]

# 16. Checkpoints ------------------------------------------------------------------------------------------
# A run is kept in one .safetensors file: the length of a header in 8 bytes; the header, JSON with the type,
# shape and place of each matrix and some strings, the metadata; then plain numbers. Other programs can open
# it, and unlike a pickle it cannot run code. A new file is written beside the old one and renamed once it is
# whole and on the disk: whatever happens, one of the two is there.

@contextmanager
def reporting(what):
    """Turn an error into a UserError: what cannot be done, and why."""
    try:
        yield
    except Exception as error:  # a damaged file can lead to any
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise UserError(f"{what[:100]}: {reason[:100]}") from None

def replace_file(path, parts):
    """Write parts of bytes into a new file, which then takes the place of `path`."""
    target = os.path.realpath(path)  # for a link, replace its target
    part = os.path.join(os.path.dirname(target), f"{os.getpid()}.{time.time_ns()}.part")  # no other's name
    with reporting(f"cannot save {path}"):
        try:
            with open(part, "xb") as file:  # x: never through a link or into an existing file
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            if os.path.exists(target):
                shutil.copymode(target, part)
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                os.remove(part)
            raise

def write_safetensors(path, tensors, metadata):
    """Write name -> rows of floats and a dictionary of strings."""
    header, end = {"__metadata__": metadata}, 0
    for name, rows in tensors.items():
        start, end = end, end + 8 * len(rows) * len(rows[0])
        shape = [len(rows), len(rows[0])] if len(rows) > 1 else [len(rows[0])]  # a gain or bias is a vector
        header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = (struct.pack(f"<{len(row)}d", *row) for (row,) in rows_of(tensors))
    replace_file(path, chain([len(text).to_bytes(8, "little"), text], numbers))

def read_safetensors(path):
    """Yield (name -> shape, metadata), then (name, rows) for each matrix. So a caller can refuse a file
    before its numbers fill the memory."""
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size - 8, int.from_bytes(file.read(8), "little")
        require(length <= min(size, 10**8), "it is cut short, or no .safetensors file")
        header, end = json.loads(file.read(length)), 0
        metadata = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            shape, dtype = entry["shape"], entry["dtype"]
            require(dtype in ("F32", "F64"), f"it holds {dtype}; F32 and F64 are read")
            require(len(shape) in (1, 2) and all(type(n) is int and n > 0 for n in shape), f"shape {shape}")
            start, end = end, end + math.prod(shape) * int(dtype[1:]) // 8
            require(entry["data_offsets"] == [start, end], f"{name} is out of place")
        require(end == size - length, "it is cut short, or too long")
        yield {name: (1, *entry["shape"])[-2:] for name, entry in entries}, metadata  # a vector is one row
        for name, entry in entries:
            layout = struct.Struct(f"<{entry['shape'][-1]}{'f' if entry['dtype'] == 'F32' else 'd'}")
            numbers = file.read(entry["data_offsets"][1] - entry["data_offsets"][0])
            rows = [list(row) for row in layout.iter_unpack(numbers)]
            require(all(map(math.isfinite, chain(*rows))), f"{name} has a number that is not finite")
            yield name, rows

OVERFLOW = "the model's numbers have overflowed: train it with a lower --lr"

class Run:
    """A training run: its flags and all it needs to go on. Without weights, it draws new ones."""
    def __init__(self, args, tokenizer, rng, weights=None):
        self.args, self.tokenizer, self.rng = args, tokenizer, rng
        self.edge = [] if args.stream else [tokenizer.bos]  # what stands before and after a document
        self.config = Config(tokenizer.vocab_size, args.layers, args.d_model, args.heads, args.context)
        self.model, self.shapes, draw_weights = MODELS[args.arch]
        self.weights = draw_weights(self.config, rng) if weights is None else weights
        self.m, self.v = zeros(self.weights), zeros(self.weights)
        self.step, self.recent, self.saved = 0, [], "nothing was saved"  # recent: losses since a validation
    def wrap(self, engine): return {name: engine.wrap(rows) for name, rows in self.weights.items()}

    def facts(self):
        """Return all that describes the run, except its matrices."""
        return {"flags": as_argv(self.args), "characters": "".join(self.tokenizer.ids),
                "merges": self.tokenizer.merges, "step": self.step, "recent": self.recent,
                "random": self.rng.getstate(), "config": vars(self.config)}

    def save(self):
        """Write the checkpoint, if there is to be one. Raises ArithmeticError if it would be useless."""
        if self.args.save is None:
            return
        tensors = {**self.weights}
        for name in self.weights:
            tensors |= {"optimizer.m." + name: self.m[name], "optimizer.v." + name: self.v[name]}
        finite = all(all(map(math.isfinite, row)) for (row,) in rows_of(tensors))
        require(finite, f"at step {self.step}, {OVERFLOW}", ArithmeticError)
        metadata = {name: json.dumps(value) for name, value in self.facts().items()}
        write_safetensors(self.args.save, tensors, {"format": "pt", **metadata})
        self.saved = f"step {self.step} is saved in {self.args.save}"

def read_facts(found, metadata):
    """Return a Run, still without weights, from what a checkpoint says before its numbers."""
    names = "flags", "characters", "merges", "step", "recent", "random"
    for name in names:
        require(name in metadata, f"it was not saved by this program: no {name} in its metadata")
    flags, characters, merges, step, recent, state = [json.loads(metadata[name]) for name in names]
    args = make_parser(add_help=False).parse_args(flags)
    require(set(flags) <= set(as_argv(args)) and args.layers <= len(found), "bad flags")
    lengths = [1] * len(characters)
    for left, right in merges:  # a few of them can make vast tokens
        lengths.append(min(lengths[left] + lengths[right], 10**8))
    require(sum(lengths) < 10**8 and min(chain([0], *merges)) == 0, "bad merges")
    tokenizer, rng = BPETokenizer(characters, merges), random.Random()
    rng.setstate((state[0], tuple(state[1]), state[2]))
    run = Run(args, tokenizer, rng, {})
    run.step, run.recent = int(step), list(map(float, recent))
    require(0 <= run.step < 10**12 and all(0 <= loss < math.inf for loss in run.recent), "bad step or losses")
    wanted = run.shapes(run.config)
    means = {f"optimizer.{mean}.{name}": shape for mean in "mv" for name, shape in wanted.items()}
    require(found in (wanted, {**wanted, **means}), "its matrices are not those of its model")
    return run

def load(path):
    """Return the Run in a checkpoint. Raises UserError if the file is not a sound one."""
    with reporting(f"cannot read {path}"):
        content = read_safetensors(path)
        run = read_facts(*next(content))
        tensors = dict(content)
        run.weights = {name: tensors[name] for name in run.shapes(run.config)}
        run.m, run.v = zeros(run.weights), zeros(run.weights)
        if len(tensors) > len(run.weights):  # a file of weights alone has no running means
            run.m = {name: tensors["optimizer.m." + name] for name in run.weights}
            run.v = {name: tensors["optimizer.v." + name] for name in run.weights}
        require(all(min(row) >= 0 for (row,) in rows_of(run.v)), "a mean of squares is below 0")
        run.saved = f"step {run.step} is saved in {path}"
        return run

# 17. Looking inside ---------------------------------------------------------------------------------------
# What does a model make of a text? For each position, --explain shows what the model expected and what came;
# -log p of that is the loss there, in nats, or with log2 in bits. Then it shows where each head looked: each
# row of a map is a position, and the shades in it are the shares that it took of the values up to its own.

def explain(run, ids):
    """Print what a model makes of some tokens."""
    names = [repr(token)[1:-1].replace(" ", "_") for token in run.tokenizer.tokens] + ["^"]
    w, n, bit = run.wrap(FastTensor), len(ids) - 1, math.log(2)
    rows = run.model(run.config, w, ids[:-1], range(n), [new_cache(run.config)] * n).data
    layers = [out.shares for out in tape if hasattr(out, "shares")]  # of each layer: those of its heads
    losses = [Tensor([row]).cross_entropy([target]).data for row, target in zip(rows, ids[1:])]
    tape.clear()
    require(math.isfinite(sum(losses)), OVERFLOW, ArithmeticError)
    print(f"{'token':6}{'next':6}    p   nats   bits the five likeliest (^ is BOS, _ a space)")
    for token, target, p, loss in zip(ids, ids[1:], map(probabilities, rows), losses):
        best = sorted(range(len(p)), key=lambda i: (-p[i], i))[:5]
        five = "  ".join(f"{names[i]:>2.2} {p[i]:.3f}" for i in best)
        print(f"{names[token]:5.5} {names[target]:5.5} {p[target]:.3f} {loss:6.3f} {loss / bit:6.3f} {five}")
    print(f"{'mean':17} {sum(losses) / n:6.3f} {sum(losses) / n / bit:6.3f}")
    text = " " + "".join(names[i][0] for i in ids[:-1])
    for layer, heads in enumerate(layers):
        print(f"\nlayer {layer}, each head: where a row looks, from · under 1/8 to █ over 7/8")
        print(" " * 6 + text * len(heads))
        for t, rows in enumerate(zip(*heads)):
            cells = ["".join("·░▒▓█"[round(p * 4)] for p in row[: t + 1]).ljust(n) for row in rows]
            print(f"{names[ids[t]]:6.6} {' '.join(cells)}".rstrip())

STYLE = """<style>svg { color-scheme: light dark; background: Canvas; color: CanvasText }
text { fill: currentColor; font: 12px monospace } polyline { fill: none; stroke: currentColor }
.grid, .loss { stroke-opacity: 0.3 } .mean { color: #2f81f7 } .validation { color: #e0790b }</style>"""

def round_ticks(low, high):
    """Return the multiples of 1, 2 or 5 times a power of ten from low to high, eleven of them at most."""
    power = 10.0 ** math.floor(math.log10(high - low))
    gap = next(gap for gap in (power / 5, power / 2, power) if high - low <= 10 * gap)
    return [i * gap for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]

def loss_plot(losses, validations):
    """Return an SVG picture of (step, loss)."""
    mean, means = 0.0, []
    for i, (step, loss) in enumerate(losses):  # a running mean over about a thirtieth of the steps
        mean += (loss - mean) / min(i + 1, len(losses) // 30 + 1)
        means.append((step, mean))
    points = losses + validations or [(0, 0.0)]
    (first, low), (last, high) = map(min, zip(*points)), map(max, zip(*points))
    last, high = last + 1, high * 1.01 + 1e-3  # beyond the first and the lowest, even for one point

    def place(x, y):
        return f"{70 + 700 * (x - first) / (last - first):.1f},{450 - 400 * (y - low) / (high - low):.1f}"
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 500">', STYLE]
    for y in round_ticks(low, high):
        svg += [f'<polyline class="grid" points="{place(first, y)} {place(last, y)}"/>',
                f'<text transform="translate({place(first, y)})" x="-50" y="4">{y:.6g}</text>']
    svg += [f'<text transform="translate({place(x, low)})" x="-9" y="20">{x:g}</text>'
            for x in round_ticks(first, last) if x % 1 == 0]
    for x, name, curve in (250, "loss", losses), (370, "mean", means), (490, "validation", validations):
        line = " ".join(place(*point) for point in curve)
        svg.append(f'<g class="{name}"><polyline points="{line}"/><text x="{x}" y="30">{name}</text></g>')
    return "\n".join([*svg, "</svg>\n"])

def begin_trace(path, run):
    """Write the first line of a trace, or cut off what an interrupted run wrote beyond its last save."""
    with reporting(f"cannot write {path}"), open(path, "a+b" if run.step else "w+b") as file:
        file.seek(0)
        lines = [line for line in file if line.endswith(b"\n") and json.loads(line)["step"] <= run.step]
        file.truncate(sum(map(len, lines)))
        if not lines:
            facts = {**run.facts(), "bos": run.tokenizer.bos, "weights": run.weights}
            file.write(json.dumps(facts).encode() + b"\n")

def write_trace(path, run, batch, loss, grads):
    """Write a line of JSON about the step to be made; of the first, also all gradients and operations."""
    facts = {"step": run.step + 1, "documents": [run.tokenizer.decode(ids) for ids in batch], "tokens": batch,
             "loss": loss, "learning_rate": learning_rate(run.args, run.step), "gradient_norm": norm(grads)}
    if run.step == 0:
        mean_loss(run.config, run.wrap(FastTensor), batch, run.model)
        names = [out.rule.__qualname__.split(".<")[0].split(".")[-1] for out in tape]  # of the operations
        facts |= {"gradients": grads, "operations": [[n, out.data] for n, out in zip(names, tape)]}
        tape.clear()
    with reporting(f"cannot write {path}"), open(path, "ab") as file:
        file.write(json.dumps(facts).encode() + b"\n")

# 18. The command line -------------------------------------------------------------------------------------
# Without flags, the numbers are those of the reference. If something is wrong, standard error gets one line,
# and the exit status is 2 for the command line, 128 plus its number for a signal, and 1 for everything else.

def draw(logits, temperature, top_k, rng):
    """Return a token id, one of the top_k likeliest (0: of all). Temperature 0 takes the likeliest."""
    require(all(map(math.isfinite, logits)), OVERFLOW, ArithmeticError)
    top = max(logits)
    if temperature == 0:
        return logits.index(top)
    least = sorted(logits)[-top_k] if 0 < top_k < len(logits) else -math.inf
    odds = [math.exp((a - top) / temperature) if a >= least else 0.0 for a in logits]
    return rng.choices(range(len(odds)), weights=odds)[0]

def generate(run, rng):
    """Return the prompt and what the model adds to it: up to --max-tokens tokens, or until BOS."""
    args, tokenizer, size = run.args, run.tokenizer, run.config.block_size
    past = (run.edge + tokenizer.encode(args.prompt)) or [tokenizer.ids.get("\n", 0)]  # a stream has no BOS
    w, cache = run.wrap(ENGINES[args.engine]), new_cache(run.config)
    begin, new, position = len(past), past[:], 0
    for _ in range(args.max_tokens or size):
        if position + len(new) > size:  # read the later half again from position 0, and forget the rest
            new, position, cache = past[-((size + 1) // 2) :], 0, new_cache(run.config)
        positions, caches = range(position, position + len(new)), [cache] * len(new)
        logits = run.model(run.config, w, new, positions, caches).data[-1]
        tape.clear()
        position += len(new)
        new = [draw(logits, args.temperature, args.top_k, rng)]
        if new[0] == tokenizer.bos:
            break
        past += new
    return args.prompt + tokenizer.decode(past[begin:])

def load_corpus(args, rng):
    """Return the documents to train on, shuffled, and those held out. A stream is one document of each."""
    paths, docs = set(), []
    default = "input.txt" if os.path.exists("input.txt") else str(Path(__file__).with_name("input.txt"))
    for pattern in args.corpus or [default]:
        with reporting(f"cannot read {pattern}"):
            found = [] if os.path.exists(pattern) else list(islice(iglob(pattern, recursive=True), 10**5))
        paths.update(map(os.path.normpath, found or [pattern]))
    for path in sorted(paths):
        with reporting(f"cannot read {path}"):
            require(len(paths) < 10**5 and not Path(path).is_char_device(), "no file, or one of too many")
            docs += [Path(path).read_text("utf-8-sig")] if args.stream else read_documents(path)
    if not args.stream:
        rng.shuffle(docs)
    whole = "".join(docs) if args.stream else docs
    cut = len(whole) - (max(1, round(len(whole) * args.val_fraction)) if args.val_fraction else 0)
    require(cut > 0, f"there is too little text in {', '.join(sorted(paths))[:100]}")
    parts = whole[:cut], whole[cut:]
    return [[part] if part else [] for part in parts] if args.stream else parts

def prepare(args, run):
    """Return the Run, a new one if it is None, the documents to train on as strings of chr(id), and at most
    128 lists of ids to validate on, spread over all that is held out."""
    rng = random.Random(args.seed)
    docs, held_out = load_corpus(args, rng)
    print(f"num docs: {len(docs)}")
    tokenizer = run.tokenizer if run else BPETokenizer(docs + held_out, [])
    if args.vocab_size and not run:
        merges = learn_merges(tokenizer.merge(docs), args.vocab_size, len(tokenizer.tokens))
        tokenizer = BPETokenizer(tokenizer.tokens, merges)
    print(f"vocab size: {tokenizer.vocab_size}")
    run = run or Run(args, tokenizer, rng)
    print(f"num params: {sum(len(row) for (row,) in rows_of(run.weights))}")
    edge, size = "".join(map(chr, run.edge)), args.context
    docs, held_out = [[edge + doc + edge for doc in tokenizer.merge(part)] for part in (docs, held_out)]
    if args.stream:
        held_out = [doc[i : i + size + 1] for doc in held_out for i in range(0, len(doc) - 1, size)]
        enough = len(docs[0]) > size and (held_out or not args.val_fraction)
        require(enough, f"a stream of {len(docs[0])} tokens is too short for a context of {size}")
    held_out = [list(map(ord, doc[: size + 1])) for doc in held_out[:: len(held_out) // 128 + 1]]
    tokenizer.encode(args.prompt)  # refuses what the model cannot know
    explained = 2 * run.edge + tokenizer.encode(args.explain or "")
    require(args.explain is None or len(explained) > 1, "--explain needs two tokens at least", UsageError)
    return run, docs, held_out

def next_batch(run, docs, size):
    """Return the next batch: documents, cut after block_size + 1 tokens, or pieces of a stream that long."""
    length = run.config.block_size + 1
    if run.args.stream:
        rng = random.Random(f"{run.args.seed} {run.step}")  # so a resumed run draws the same
        starts = [rng.randrange(len(docs[0]) - length + 1) for _ in range(size)]
        windows = [docs[0][start : start + length] for start in starts]
    else:
        windows = [docs[(run.step * size + i) % len(docs)][:length] for i in range(size)]
    return [list(map(ord, window)) for window in windows]

def validate(run, held_out):
    """Print the mean losses of training and validation, and return the latter. Warn or stop if it is high."""
    args, total, w = run.args, 0.0, run.wrap(ENGINES[run.args.engine])
    for ids in held_out:  # one at a time, to save memory
        total += mean_loss(run.config, w, [ids], run.model).data * (len(ids) - 1)
        tape.clear()
    loss, validation = sum(run.recent) / len(run.recent), total / count_predictions(held_out)
    require(math.isfinite(validation), OVERFLOW, ArithmeticError)
    run.recent.clear()
    print(f"step {run.step:4d} / {args.steps:4d} | loss {loss:.4f} on average | validation {validation:.4f}")
    above = (validation / max(loss, 1e-9) - 1) * 100  # much of it shows that the model has begun to memorize
    message = f"at step {run.step} the validation loss is {above:.0f} % above the training loss"
    require(args.div_crit is None or above <= args.div_crit, message)
    if above > (20 if args.div_warn is None else args.div_warn):
        warn(f"warning: {message}")
    return validation

def train(run, docs, held_out, signals):
    """Train to the last step or a signal. Save then, and after any error but overflow."""
    args, first, begin, losses, validations = run.args, run.step, time.perf_counter(), [], []
    workers = Workers(args.workers, ENGINES[args.engine], run.model)
    if args.trace:
        begin_trace(args.trace, run)
    signals.training = True
    try:
        while run.step < args.steps and not signals.caught:
            batch = next_batch(run, docs, args.batch_size)
            loss, grads = workers.loss_and_grads(run.config, run.weights, batch)
            print(f"step {run.step + 1:4d} / {args.steps:4d} | loss {loss:.4f}", end="\r")
            require(math.isfinite(loss), f"at step {run.step + 1}, {OVERFLOW}", ArithmeticError)
            if args.trace:
                write_trace(args.trace, run, batch, loss, grads)
            clipped = clip(grads, args.clip_grad) if args.clip_grad else grads
            settings = {**vars(args), "step": run.step, "lr": learning_rate(args, run.step)}
            OPTIMIZERS[args.optimizer](run.weights, clipped, run.m, run.v, **settings)
            run.step += 1
            losses.append((run.step, loss))
            if held_out:
                run.recent.append(loss)
                if run.step % args.eval_every == 0 or run.step == args.steps:
                    validations.append((run.step, validate(run, held_out)))
            if args.gen_every and run.step % args.gen_every == 0:
                print(f"\nsample at step {run.step}: {generate(run, random.Random(run.step))}")
            if run.step % args.save_every == 0 and run.step < args.steps:
                try:
                    run.save()
                except UserError as error:  # such as a full disk; the next time may be better
                    warn(f"warning: {error}")
            if sys.stderr.isatty():
                rate = (run.step - first) / (time.perf_counter() - begin)
                text = f"\x1b[40C{rate:.3g} steps/s, {(args.steps - run.step) / rate:.0f} s left\x1b[K"
                print(text, end="\r", file=sys.stderr)  # to the right of the loss
        run.save()
    except (RuntimeError, OSError, MemoryError):
        if run.step > first:
            run.save()
        raise
    finally:
        workers.stop()
        if args.plot:
            replace_file(args.plot, [loss_plot(losses, validations).encode()])
    signals.training = False
    if signals.caught:
        raise KeyboardInterrupt

class UsageError(UserError): status = 2
class Parser(argparse.ArgumentParser):
    def error(self, message): raise UsageError(message[:120])
def warn(message): print("\n" * sys.stderr.isatty() + f"microgpt: {message}", file=sys.stderr, flush=True)

def number(kind, low, high, text):
    """Return the number in a text. Raises ArgumentTypeError unless low <= number < high."""
    with suppress(ValueError):
        if low <= kind(text) < high:
            return kind(text)
    whole = "whole " * (kind is int)
    raise argparse.ArgumentTypeError(f"{text[:100]!r} is no {whole}number from {low} to below {high:g}")

KINDS = {"N": (int, 0, 10**12), "COUNT": (int, 1, 10**9), "SHARE": (float, 0, 1), "X": (float, 0, math.inf)}
FLAGS = """
basics   --corpus GLOB                    | text files, a document per line; repeatable (input.txt)
         --stream                         | the corpus is one continuous text, not lines
         --layers --n-layer COUNT         | how many layers = 1
         --d-model --n-embd COUNT         | width: channels per position = 16
         --context --block-size COUNT     | how many tokens the model can see = 16
         --steps N                        | total training steps = 1000
         --batch-size COUNT               | documents per step = 1
         --save FILE                      | save the run in this file, for --resume
         --resume FILE                    | continue this run; other flags override its own
         --prompt TEXT                    | what every sample begins with
data     --vocab-size --merges N          | byte-pair merges to learn, 0: characters only = 0
model    --heads --n-head COUNT           | attention heads per layer = 4
         --arch microgpt|gpt2             | gpt2: with LayerNorm, biases, GELU = microgpt
training --optimizer sgd|momentum|rmsprop|adam|adamw | what moves the weights = adam
         --lr X                           | the learning rate at its highest = 0.01
         --beta1 SHARE                    | how long it remembers gradients = 0.85
         --beta2 SHARE                    | how long it remembers their squares = 0.99
         --eps X                          | keeps it from dividing by 0 = 1e-08
         --weight-decay X                 | adamw: how hard it pulls weights to 0 = 0.01
         --schedule linear|cosine|constant | how the learning rate falls; --cosine for short = linear
         --warmup-steps N                 | steps in which it rises first = 0
         --clip-grad X                    | largest norm of all gradients together; 0, --no-clip-grad: any = 0
         --seed N                         | seed of the random generator = 42
watching --val-fraction SHARE             | share of the corpus to hold out for validation = 0
         --eval-every COUNT               | validate every COUNT steps = 100
         --div-warn X                     | warn if the validation loss is X %% above training (20)
         --div-crit X                     | stop if it is X %% above training
         --gen-every COUNT                | show a sample every COUNT steps
         --plot FILE.svg                  | draw the loss
         --trace FILE.jsonl               | write a line of numbers for every step
         --explain TEXT                   | show what the model makes of this text
keeping  --save-every COUNT               | also save every COUNT steps = 500
sampling --samples N                      | how many samples = 20
         --temperature X                  | 1: the model's odds, 0: always the likeliest = 0.5
         --top-k N                        | draw from the N likeliest tokens, 0: from all = 0
         --max-tokens COUNT               | at most COUNT new tokens per sample (the context)
engine   --engine scalar|tensor|vulkan    | scalar: part one alone; vulkan or --vulkan: on the GPU = tensor
         --workers COUNT                  | processes to share each batch = 1
"""
SHORT = {"--cosine": "--schedule=cosine", "--vulkan": "--engine=vulkan", "--no-clip-grad": "--clip-grad=0"}
FIXED = "layers", "d_model", "heads", "context", "arch", "vocab_size", "stream"  # in a resumed run
THIS_TIME = "save", "resume", "plot", "trace", "explain"  # a checkpoint does not keep these

def make_parser(**more):
    """Return the parser of the flags."""
    parser = Parser(prog="microgpt", usage="%(prog)s [flags]", allow_abbrev=False, **more)
    for line in FLAGS.strip().splitlines():
        names, _, help = line.partition(" | ")
        names, (help, _, default) = names.split(), help.partition(" = ")
        if line[0] != " ":
            group = parser.add_argument_group(names.pop(0))
        word = "" if names[-1].startswith("-") else names.pop()
        if not word:
            more = {"action": "store_true"}
        elif "|" in word:
            more = {"choices": word.split("|")}
        else:
            kind = partial(number, *KINDS[word]) if word in KINDS else str
            more = {"type": kind, "metavar": word, "action": "append" if word == "GLOB" else None}
        help += f" ({default})" if default else ""
        group.add_argument(*names, help=help, default=default or None, **more)
    parser.set_defaults(prompt="")
    return parser

def as_argv(args):
    """Return the command line for the flags that a checkpoint keeps."""
    flags = [(name, each) for name, value in vars(args).items() if name not in THIS_TIME
             for each in (value if isinstance(value, list) else [value]) if each is not None]
    return [f"--{name.replace('_', '-')}" + ("" if each is True else f"={each}") for name, each in flags]

def parse_args(argv):
    """Return the flags, and the Run to resume or None. Saved flags hold unless given anew."""
    parser, run = make_parser(), None
    argv = [SHORT.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(argv)
    if args.resume is not None:
        run, corpus = load(args.resume), args.corpus
        parser.set_defaults(**vars(run.args))
        args = parser.parse_args(argv)
        args.corpus = corpus or run.args.corpus  # not both, as argparse would have it
        args.save = args.save or (args.resume if run.step < args.steps else None)
        changed = [name.replace("_", "-") for name in FIXED if getattr(args, name) != getattr(run.args, name)]
        require(not changed, f"{args.resume} was made with another --{' --'.join(changed)}", UsageError)
        if args.optimizer != run.args.optimizer:
            warn(f"note: {args.optimizer} starts anew, without the running means of {run.args.optimizer}")
            run.m, run.v = zeros(run.weights), zeros(run.weights)
        run.args = args
    if args.div_warn is not None or args.div_crit is not None:  # these need a validation
        args.val_fraction = args.val_fraction or 0.1
    check(args)
    return args, run

def check(args):
    """Refuse flags that do not go together, and files that cannot be written: better now than after hours."""
    heads, width, workers, size = args.heads, args.d_model, args.workers, args.batch_size
    require(width % heads == 0, f"--heads {heads} does not divide --d-model {width}", UsageError)
    require(12 * args.layers * width**2 + args.context * width <= 10**9, "the model is too large", UsageError)
    require(workers <= size, f"--workers {workers} is more than --batch-size {size}", UsageError)
    if args.save and os.path.exists(os.path.realpath(args.save)) and args.save != args.resume:
        load(args.save)  # only a checkpoint is replaced
    for name, end in ("save", ""), ("plot", ".svg"), ("trace", ".jsonl"):
        if (path := getattr(args, name)) is not None:
            folder = os.path.dirname(os.path.realpath(path))
            good = path.endswith(end) and not os.path.isdir(path) and os.access(folder, os.W_OK)
            message = f"--{name} needs a file{end and f' *{end}'}, in a writable folder, not {path[:100]!r}"
            require(path and good, message, UsageError)

class Signals:
    """In training, the first signal lets the step end; any other ends the run at once."""
    caught, training = 0, False

    def catch(self, number, frame):
        if self.caught:
            os._exit(128 + number)
        self.caught = number
        if not self.training:
            raise KeyboardInterrupt
        if sys.stderr.isatty():
            os.write(2, b"\nmicrogpt: finishing this step; a second time ends at once\n")

def show(run):
    """Print the samples and what --explain asks for."""
    args = run.args
    title = f"--- inference (new, hallucinated {'text' if args.stream else 'names'}) ---"
    print(f"\n{title}" if args.samples else "")
    for i in range(args.samples):
        print(f"sample {i + 1:2d}: {generate(run, run.rng)}")
    if args.explain is not None:
        ids = run.edge + run.tokenizer.encode(args.explain) + run.edge
        explain(run, ids[: args.context + 1])

def main(argv=None, signals=Signals()):
    """Run the command line. Returns its exit status."""
    run, message, status = None, "", 1
    try:
        try:
            args, run = parse_args(argv)
            run, docs, held_out = prepare(args, run)
            train(run, docs, held_out, signals)
            show(run)
            status = 0
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + (signals.caught or 2)
    except (RuntimeError, ArithmeticError, MemoryError) as error:
        message, status = f"error: {str(error) or 'there is not enough memory'}", getattr(error, "status", 1)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again on exit
        if not isinstance(error, BrokenPipeError):  # whoever read the output has gone, as `head` does
            message, status = f"error: cannot write the output: {error.strerror}", 1
    if message:
        warn(message + (f"; {run.saved}" if run else ""))
    return status

if __name__ == "__main__":
    caller = Signals()
    for name in "stdout", "stderr":
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # None: closed from the start
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal may lack a character
    for stop in STOPS:
        if signal.getsignal(stop) is not signal.SIG_IGN:  # nohup sets it
            signal.signal(stop, caller.catch)
    if sys.implementation.name != "pypy":  # which has no other way to free memory
        gc.disable()  # training makes no reference cycles
    exit_status = main(None, caller)
    if exit_status == 1:  # after an error, a thread of the pool may wait for dead workers forever
        os._exit(exit_status)
    sys.exit(exit_status)
