#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A GPT in one file of pure Python, to be read from top to bottom.

    python microgpt.py            learn the names in input.txt, then invent new ones
    python microgpt.py --help     list all options

The file has three parts. You can stop after any of them and have a complete program:

    Part one    the complete algorithm, one number at a time               sections 1 to 8
    Part two    the same, much faster: matrices, subwords, GPU, cores      sections 9 to 13
    Part three  a tool for everyday use                                    sections 14 to 20

Given the same input.txt, it prints the same numbers as the original, microgpt by Andrej Karpathy.
"""

# PART ONE: THE COMPLETE ALGORITHM =========================================================================
# This program reads a list of names and learns to invent new ones. It uses a GPT (generative pretrained
# transformer), which does only one thing: given the beginning of a name, it assigns a probability to each
# possible next token, a letter or the end of the name. The probabilities also depend on 4,192 numbers, the
# weights (or parameters), which start out random. Each training step takes one name and does four things:
#
#     guess      Let the model guess what comes next at each position in the name.      sections 4 and 5
#     compare    Measure how much the real name surprised the model. This is the loss.  sections 3 and 4
#     ask        Find out how a small change in each weight would change the loss.      section 3
#     nudge      Move every weight a little in the direction that lowers the loss.      section 6
#
# After 1,000 steps, the program invents names: it picks a letter at random, likelier letters more often, then
# another that fits all the letters so far, and so on, until it picks the end. Large language models are first
# trained in the same way, with billions of weights, and with pieces of words in place of letters.

import math, random
from dataclasses import dataclass

# 1. Dataset -----------------------------------------------------------------------------------------------
# A language model learns from documents. Here, a document is one line of a text file: a name, but a line of
# verse or a chess game would work, too. Put your own lines in input.txt, and the model learns to write others
# like them. It learns only the first 16 characters of a line. For longer lines, raise block_size (section 5).

def read_documents(path):
    """Return the nonblank lines of a UTF-8 text file, without surrounding whitespace."""
    with open(path, encoding="utf-8-sig") as file:  # -sig: skip a byte-order mark
        lines = [line.strip() for line in file]
    return [line for line in lines if line]

# 2. Characters --------------------------------------------------------------------------------------------
# A model computes with numbers. So the text is split into tokens, here characters, and each distinct token
# gets a number, its id: in sorted order, the characters get 0, 1, 2, ... One more token, BOS ("beginning of
# sequence"), gets the last id. Section 8 puts BOS before and after each document, so that the model can learn
# how to begin and when to stop. With the letters a to z, "emma" becomes [26, 4, 12, 12, 0, 26].

class CharTokenizer:
    """Convert text to ids and back. The characters get the first ids, and BOS gets the last."""
    def __init__(self, docs):
        self.tokens = sorted(set("".join(docs)))
        self.ids = {char: i for i, char in enumerate(self.tokens)}
        self.bos = len(self.tokens)
        self.vocab_size = len(self.tokens) + 1

    def encode(self, text):
        """Return the ids of a text. Raise KeyError for a character that is in no document."""
        return [self.ids[char] for char in text]

    def decode(self, ids):
        """Return the text that the ids stand for, leaving out BOS."""
        return "".join(self.tokens[i] for i in ids if i != self.bos)

# 3. Autograd ----------------------------------------------------------------------------------------------
# The surprise at a token is -log(p), where p is the probability that the model gave that token: 0 for p = 1,
# 0.69 for p = 1/2, 3.3 for p = 1/27. (log(x) is the natural logarithm: e = 2.718 must be raised to log(x) to
# give x.) The probability of a name is the product of its tokens' probabilities, and logarithms turn products
# into sums, so that each token has a part of its own. The loss of a name is the mean surprise at all its
# tokens except the first BOS, which the model is given.
#
# The gradient of a weight says how fast the loss changes with that weight: if the gradient is 2, raising the
# weight by 0.001 raises the loss by about 0.002. Autograd ("automatic gradients") computes the gradients of
# all weights in one pass. To make that possible, every number remembers where it came from: a Value holds a
# number (data), the Values it was computed from (inputs), and how fast the number changes with each input
# (slopes). If a grows by 0.001, a * b grows by 0.001 * b. So a * b has slope b with respect to a, and slope a
# with respect to b. Both slopes of a + b are 1. Take a = 2, b = 3, and c = a * b + a:
#
#     b = 3 --- slope 2 (= a) ---.
#                                 > a * b = 6 --- slope 1 ---.
#     a = 2 --- slope 3 (= b) ---'                            > c = 8
#       '--------------------- slope 1 ----------------------'
#
# A gradient is the slope all the way to the end, here c. Along a path in the picture, slopes multiply:
# raising b by 0.001 raises a * b by 0.002, and that raises c by 0.002. Where paths meet, their products add
# up: the gradient of a is 3 * 1 + 1 = 4. (Check: a = 2.001 makes c = 8.004.) To apply this rule to all
# Values, we put every result on a list, the tape (or Wengert list), here [a * b, c]. Then we walk the tape
# backward, and each result adds its own gradient, times the slope for an input, to that input's gradient:
#
#     c       has gradient 1: c changes one-to-one with itself. It passes 1 * 1 to a * b, and 1 * 1 to a.
#     a * b   has gradient 1. It passes 1 * 2 to b, which now has 2, and 1 * 3 to a, which now has 1 + 3 = 4.
#
# Whatever uses a Value comes after it on the tape. When the walk reaches a Value, its gradient is complete.

tape = []

class Value:
    """A number that remembers where it came from. After backward(), grad is its gradient."""
    __slots__ = "data", "grad", "inputs", "slopes"  # no other attributes, which saves memory
    def __init__(self, data, inputs=(), slopes=()):
        self.data = data
        self.grad = 0.0
        self.inputs = inputs
        self.slopes = slopes
        if inputs:
            tape.append(self)

    def __repr__(self): return f"Value({self.data:.4g}, grad={self.grad:.4g})"

    # Python turns operators into method calls: a + b calls __add__, a * b calls __mul__, and a ** k calls
    # __pow__. For 2 + a, where 2 is not a Value, Python calls a.__radd__(2) ("right add").
    def __add__(self, other):
        if isinstance(other, Value):
            return Value(self.data + other.data, (self, other), (1.0, 1.0))
        return Value(self.data + other, (self,), (1.0,))

    def __mul__(self, other):
        if isinstance(other, Value):
            return Value(self.data * other.data, (self, other), (other.data, self.data))
        return Value(self.data * other, (self,), (other,))

    # The next slopes come from a calculus book. To test one: 3.001**2 is 9.006, so the slope at 3 is 6.
    def __pow__(self, k):  # k is a plain number. The slope of a**k is k * a ** (k - 1).
        return Value(self.data**k, (self,), (k * self.data ** (k - 1),))

    def exp(self):
        result = math.exp(self.data)
        return Value(result, (self,), (result,))  # the slope of e^a is e^a itself
    def log(self): return Value(math.log(self.data), (self,), (1 / self.data,))  # log(a) has slope 1 / a
    def relu(self): return Value(max(0.0, self.data), (self,), (1.0 if self.data > 0 else 0.0,))

    def __neg__(self): return self * -1
    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other**-1
    def __rtruediv__(self, other): return self**-1 * other

    def backprop(self):
        """Add this Value's grad, times the slope for an input, to the grad of each input."""
        for source, slope in zip(self.inputs, self.slopes):
            source.grad += slope * self.grad

    def backward(self):
        """Add gradients to the grad of all Values that led to this one, the loss. Empty the tape: earlier
        results no longer pass gradients on. Raise RuntimeError if the loss is not on the tape."""
        if self not in tape:
            raise RuntimeError("the tape does not hold this loss: compute it again (to use two, add them up)")
        while tape[-1] is not self:
            tape.pop()  # computed after the loss, which cannot depend on it
        self.grad = 1.0
        while tape:
            tape.pop().backprop()

# 4. The operations ----------------------------------------------------------------------------------------
# The model turns each token of a name into a row of 16 numbers. Step by step, it reworks each row into a row
# of 27 scores, one for each token that can come next. The higher the score, the likelier the token. Weighted
# sums with simple functions in between are called a neural network. This one needs six operations:
#
#     embed       look up the row of a token          rmsnorm      bring all rows to the same scale
#     +           add two rows                        relu         replace negative numbers with 0
#     linear      make weighted sums of a row         attention    gather from this row and earlier ones
#
# In each layer of the model, attention brings the past into each row. Then linear, relu, and linear work on
# the row. Training adds a seventh operation, cross_entropy, for the loss. Five helpers for lists of Values
# come first: add_up, dot, softmax, rmsnorm, and attend. (In comments, e^a is e to the power of a.)

def add_up(values):
    """Return the sum of a list of Values as one Value. (sum() would make a new Value for each addition.)"""
    return Value(sum([v.data for v in values]), values, [1.0] * len(values))

def dot(a, b):
    """Return the dot product of two rows: a[0] * b[0] + a[1] * b[1] + ..."""
    return add_up([x * y for x, y in zip(a, b)])

def softmax(scores):
    """Turn scores into probabilities, which are positive and add up to 1: divide each e^score by the sum of
    all e^score. A score that is higher by 1 gets e (about 2.7) times the probability. The scores 2, 1, 0
    become 0.67, 0.24, 0.09."""
    top = max(a.data for a in scores)  # e^(a - top) is e^a / e^top: the same shares, but no overflow
    exps = [(a - top).exp() for a in scores]
    total = add_up(exps)
    return [e / total for e in exps]

def rmsnorm(row):
    """Divide a row by its root mean square, so that its numbers are about 1 in size, whatever they were.
    [3, 4] becomes [0.85, 1.13]. The 1e-5 prevents division by zero. (Zhang and Sennrich 2019)"""
    mean_square = dot(row, row) / len(row)
    scale = (mean_square + 1e-5) ** -0.5  # 1 / root
    return [a * scale for a in row]

# Attention lets a row gather information from itself and earlier rows. After "em", a good guess takes the e
# into account, but at first, m's row knows only its own token and position. So three linears, weighted sums
# of its 16 numbers, turn each row into a query (what the row looks for), a key (what the row can be found
# by), and a value (what the row passes on; a row of Values, despite the name). Nobody sets these: training
# finds weights that make queries match useful keys.
#
# The score of a match is the dot product of a query and a key. It is large when both have large numbers of
# the same sign in the same places. With more products, scores lie farther apart (after n coin flips for +1 or
# -1, the sum is typically sqrt(n) from 0), and softmax gives nearly everything to the largest. So we divide
# each score by sqrt(n). Softmax turns the scores into shares, and the result is the mean of the values,
# weighted by the shares. Suppose that n = 4, and m's row has the query [2, 0, 1, 1]:
#
#     row    key             score                                       share    value
#     BOS    [0, 1, 0, 0]    (2 * 0 + 0 * 1 + 1 * 0 + 1 * 0) / 2 = 0     0.09     [5, ...]
#     e      [1, 0, 2, 0]    (2 * 1 + 0 * 0 + 1 * 2 + 1 * 0) / 2 = 2     0.67     [1, ...]
#     m      [0, 1, 1, 1]    (2 * 0 + 0 * 1 + 1 * 1 + 1 * 1) / 2 = 1     0.24     [0, ...]
#
# So m gathers mostly from e. The first number of the result is 0.09 * 5 + 0.67 * 1 + 0.24 * 0 = 1.12.

def attend(query, keys, values):
    """Return what one row gathers from the rows with these keys and values. (Vaswani et al. 2017)"""
    scores = [dot(query, key) / math.sqrt(len(query)) for key in keys]
    shares = softmax(scores)
    return [dot(shares, column) for column in zip(*values)]  # zip(*...): all first numbers, all second, ...

# In a Matrix of weights for linear, each row makes one output: w.rows[output][input]. In a Matrix computed
# from a text, each row belongs to one token, and its numbers are called channels: x.rows[row][channel].

class Matrix:
    """Rows of Values. No operation changes the matrices that it is given."""
    def __init__(self, rows):
        self.rows = rows

    @staticmethod  # called as Matrix.wrap(rows)
    def wrap(rows): return Matrix([[Value(a) for a in row] for row in rows])  # rows of plain numbers
    @property  # read as x.data, without parentheses
    def data(self): return [[a.data for a in row] for row in self.rows]
    @property
    def grad(self): return [[a.grad for a in row] for row in self.rows]

    def embed(self, ids):
        """Return the embedding of each id: a row of the weights themselves, so training finds it, too."""
        return Matrix([self.rows[i] for i in ids])

    def __add__(self, other):
        return Matrix([[a + b for a, b in zip(x, y)] for x, y in zip(self.rows, other.rows)])

    def linear(self, w):
        """Return weighted sums of each row, one sum for each row of weights. The row [1, 2] with the weights
        [3, 4] and [5, 6] gives [1 * 3 + 2 * 4, 1 * 5 + 2 * 6] = [11, 17]."""
        return Matrix([[dot(row, weights) for weights in w.rows] for row in self.rows])

    def rmsnorm(self): return Matrix([rmsnorm(row) for row in self.rows])

    def relu(self):
        """Replace negative numbers with 0 (rectified linear unit). Without relu, linear after linear makes
        weighted sums of weighted sums, which are weighted sums again: no more than one linear can do."""
        return Matrix([[a.relu() for a in row] for row in self.rows])

    # Heads. One softmax gives a row one set of shares. To look for two things at once, such as the last vowel
    # and the first letter, a row needs two sets. So each query, key, and value is split into 4 heads, parts
    # of 4 numbers each. Each head has its own scores and shares.
    #
    # Cache. Each row leaves its key and value in a cache for later rows. Training passes all rows of a name
    # in one call. Sampling passes one row per call and does not compute earlier rows again. A row at position
    # p sees the last p + 1 entries of the cache, its own and the p before it, but never the future, which the
    # model has to guess. Part three passes several names in one call, here "em" and "al". Each begins at 0:
    #
    #     token        BOS   e    m    BOS   a    l
    #     position      0    1    2     0    1    2
    #     sees         BOS  BOS  BOS   BOS  BOS  BOS
    #                        e    e          a    a
    #                             m               l

    def attention(self, k, v, n_head, positions, cache):
        """Return what each row gathers from itself and earlier rows of its document. The queries are in self.
        Append each row's (key, value) to cache. The rows of a document must be next to each other."""
        size = len(self.rows[0]) // n_head  # 16 // 4 = 4 channels for each head
        out = []
        for q_row, k_row, v_row, position in zip(self.rows, k.rows, v.rows, positions):
            cache.append((k_row, v_row))
            seen = cache[-1 - position :]  # the last position + 1 entries: this row and those before it
            found = []
            for start in range(0, len(q_row), size):
                head = slice(start, start + size)  # head 0 is channels 0 to 3, head 1 is channels 4 to 7, ...
                keys = [key[head] for key, _ in seen]
                values = [value[head] for _, value in seen]
                found += attend(q_row[head], keys, values)
            out.append(found)
        return Matrix(out)

    def cross_entropy(self, targets):
        """Return the loss, a Value: the mean over the rows of -log(p), where p is the softmax probability of
        the target, the token that really came next. Because p = e^score / total, where total is the sum of
        all e^score, and log(a / b) = log(a) - log(b), -log(p) is log(total) - score. This form never takes
        log(0), even where p is too small for a float."""
        losses = []
        for row, target in zip(self.rows, targets):
            top = max(a.data for a in row)  # prevents overflow, as in softmax; we add top back below
            total = add_up([(a - top).exp() for a in row])
            losses.append(total.log() + top - row[target])
        return add_up(losses) / len(losses)

# 5. GPT ---------------------------------------------------------------------------------------------------
# A row begins as its token's embedding plus its position's embedding. (Without positions, one layer could not
# tell "ema" from "mea".) Each layer then changes the row twice. Attention adds what the row has gathered. An
# MLP (multilayer perceptron: linear, relu, linear) adds what follows from it: each of its 64 sums looks for a
# pattern in the row, and relu keeps those that found one. Last, lm_head makes 27 scores, the logits.
#
# Replacing x with x + f(x), not with f(x), is called a residual connection. In a chain of f alone, slopes
# multiply, and twenty slopes of 0.5 leave a millionth of the gradient. The slope of x + f(x) is 1 plus the
# slope of f, so the gradient reaches even the first layer of a deep model.

@dataclass(frozen=True)  # writes __init__: GPT(27) sets vocab_size to 27 and keeps the defaults below
class GPT:
    """A model: its sizes, and what it computes. The weights are separate; each step wraps them in Values."""
    vocab_size: int       # distinct tokens
    n_layer: int = 1
    n_embd: int = 16      # channels in a row
    n_head: int = 4       # attention heads in a layer
    block_size: int = 16  # the most positions that the model can see

    def __post_init__(self):  # called after __init__
        if self.n_embd % self.n_head:
            raise ValueError(f"{self.n_head} heads do not divide {self.n_embd} channels")

    def shapes(self):
        """Return a dict, name -> (rows, columns) of each weight matrix, in the order of initial_weights."""
        d = self.n_embd
        out = {"wte": (self.vocab_size, d),      # weights of the token embeddings: a row for each token
               "wpe": (self.block_size, d),      # weights of the position embeddings
               "lm_head": (self.vocab_size, d)}  # language model head: makes a score for each token
        for i in range(self.n_layer):
            out[f"layer{i}.attn_wq"] = (d, d)      # makes queries
            out[f"layer{i}.attn_wk"] = (d, d)      # makes keys
            out[f"layer{i}.attn_wv"] = (d, d)      # makes values
            out[f"layer{i}.attn_wo"] = (d, d)      # output: mixes what the heads have found
            out[f"layer{i}.mlp_fc1"] = (4 * d, d)  # fully connected: 4 * d hidden channels, by convention
            out[f"layer{i}.mlp_fc2"] = (d, 4 * d)  # turns the hidden channels back into d channels
        return out

    def initial_weights(self, rng):
        """Return name -> rows of floats, drawn by rng with mean 0 and standard deviation 0.08. If all weights
        were equal, all channels would be, and training would keep them equal. As the weights are small, the
        first guesses are nearly even."""
        weights = {}
        for name, (rows, columns) in self.shapes().items():
            weights[name] = [[rng.gauss(0, 0.08) for _ in range(columns)] for _ in range(rows)]
        return weights

    def new_cache(self):
        """Return an empty cache: a list of (key, value) for each layer."""
        return [[] for _ in range(self.n_layer)]

    def logits(self, w, ids, positions, cache):
        """Return the logits, a score for each token that can come next (rows x vocab_size). Extend cache."""
        x = w["wte"].embed(ids) + w["wpe"].embed(positions)            # rows x n_embd
        x = x.rmsnorm()  # from size 0.11 to 1: each step below adds about 0.1, which would drown a small x
        for i in range(self.n_layer):
            # 1. Attention: gather from earlier rows. From here on, only copies of x are normalized.
            normed = x.rmsnorm()
            q = normed.linear(w[f"layer{i}.attn_wq"])
            k = normed.linear(w[f"layer{i}.attn_wk"])
            v = normed.linear(w[f"layer{i}.attn_wv"])
            found = q.attention(k, v, self.n_head, positions, cache[i])
            x = x + found.linear(w[f"layer{i}.attn_wo"])
            # 2. MLP: work on what was gathered, each row by itself.
            hidden = x.rmsnorm().linear(w[f"layer{i}.mlp_fc1"]).relu()  # rows x 4 n_embd
            x = x + hidden.linear(w[f"layer{i}.mlp_fc2"])              # rows x n_embd
        return x.linear(w["lm_head"])                                  # rows x vocab_size

# 6. Adam --------------------------------------------------------------------------------------------------
# A positive gradient means that the loss grows with the weight, so the weight must go down. How far?
# Gradients differ in size from weight to weight, and each comes from only one name. So Adam (Kingma and Ba
# 2015) keeps two running means for each weight: m, of its gradients (85% of the old m and 15% of the new
# gradient), and v, of their squares (99% and 1%), whose root is the usual size of a gradient. m starts at 0,
# so it is too small at first: after one gradient g, it is 0.15 * g, and dividing by 0.15 makes it g. After n
# gradients, 0.85^n of m is still that 0, so we divide m by 1 - 0.85^n, and v by 1 - 0.99^n. Then the weight
# goes down by lr * m / sqrt(v), where lr is the learning rate. Gradients of 5, 5, 5, ... and of 0.01, 0.01,
# 0.01, ... both move a weight by lr per step. Gradients of 5, -5, 5, -5, ... nearly cancel in m, which soon
# swings between 0.4 and -0.4: the first move is lr, and the moves shrink to 0.08 * lr.

def zeros(weights):
    """Return name -> rows of zeros, in the shapes of the weights."""
    return {name: [[0.0] * len(row) for row in rows] for name, rows in weights.items()}

def adam(weights, grads, m, v, step, lr, beta1=0.85, beta2=0.99, eps=1e-8):
    """Update weights, m, and v in place. step counts from 0."""
    m_part = 1 - beta1 ** (step + 1)
    v_part = 1 - beta2 ** (step + 1)
    for name in weights:
        for row, g, m_row, v_row in zip(weights[name], grads[name], m[name], v[name]):
            for i in range(len(row)):
                m_row[i] = beta1 * m_row[i] + (1 - beta1) * g[i]
                v_row[i] = beta2 * v_row[i] + (1 - beta2) * g[i] ** 2
                m_hat = m_row[i] / m_part
                v_hat = v_row[i] / v_part
                row[i] -= lr * m_hat / (math.sqrt(v_hat) + eps)  # eps prevents division by zero

# 7. Training and sampling ---------------------------------------------------------------------------------
# In training, the model guesses the next token at all positions at once. In sampling (also called inference),
# we pick a token at random, by its probability, and feed that token back, until we pick BOS or run out of
# positions. Dividing the logits by a temperature below 1 moves probability to the likeliest tokens: at 0.5,
# the scores 2, 1, 0 become 4, 2, 0, with probabilities of about 0.87, 0.12, 0.02, not 0.67, 0.24, 0.09.

def mean_loss(model, w, batch):
    """Return the mean loss over all guesses in a batch, a list of documents as lists of ids."""
    ids, targets, positions = [], [], []
    for tokens in batch:
        ids += tokens[:-1]     # in:   BOS  e   m   m   a
        targets += tokens[1:]  # out:   e   m   m   a  BOS
        positions += range(len(tokens) - 1)
    return model.logits(w, ids, positions, model.new_cache()).cross_entropy(targets)

def loss_and_grads(model, weights, batch, engine=Matrix):
    """Return the mean loss of a batch, and name -> rows of gradients. (Ignore engine until part two.)"""
    tape.clear()  # an interrupted call may have left Values on the tape
    w = {name: engine.wrap(rows) for name, rows in weights.items()}
    loss = mean_loss(model, w, batch)
    loss.backward()
    return loss.data, {name: matrix.grad for name, matrix in w.items()}

def sample(model, weights, bos, temperature, rng):
    """Return the ids of a new document, at most block_size of them, without BOS. Clear the tape."""
    w = {name: Matrix.wrap(rows) for name, rows in weights.items()}
    out, token, cache = [], bos, model.new_cache()
    for position in range(model.block_size):
        logits = model.logits(w, [token], [position], cache).rows[0]
        probabilities = softmax([a / temperature for a in logits])
        tape.clear()  # sampling needs no gradients
        token = rng.choices(range(len(probabilities)), weights=[p.data for p in probabilities])[0]
        if token == bos:
            break
        out.append(token)
    return out

# 8. Putting it together -----------------------------------------------------------------------------------
# Part one is a complete program: copy it to a file, add train_and_sample() at the end, and run it (about a
# minute). The loss begins near log(27) = 3.3, the loss of a blind guess. Each step prints the loss of one
# name, so the printed loss jumps, mostly between 2.0 and 3.2, even at the end, where its mean is about 2.5.
# To see the trend, let the finished tool draw it: python microgpt.py --plot loss.svg

def train_and_sample(path="input.txt", steps=1000):
    """Train a model on the documents in a file, then print 20 new ones."""
    rng = random.Random(42)  # the same random numbers each time
    docs = read_documents(path)
    rng.shuffle(docs)  # the file may be sorted, and 1,000 steps should see names from all of it
    print(f"num docs: {len(docs)}")
    tokenizer = CharTokenizer(docs)
    print(f"vocab size: {tokenizer.vocab_size}")
    model = GPT(tokenizer.vocab_size)
    weights = model.initial_weights(rng)
    print(f"num params: {sum(len(rows) * len(rows[0]) for rows in weights.values())}")
    m, v = zeros(weights), zeros(weights)
    for step in range(steps):
        doc = docs[step % len(docs)]
        tokens = [tokenizer.bos] + tokenizer.encode(doc) + [tokenizer.bos]
        batch = [tokens[: model.block_size + 1]]  # one document; its last token is only a target
        loss, grads = loss_and_grads(model, weights, batch)
        lr = 0.01 * (1 - step / steps)  # large moves at first, small ones at the end
        adam(weights, grads, m, v, step, lr)
        print(f"step {step + 1:4d} / {steps:4d} | loss {loss:.4f}", end="\r")  # \r: back to the line's start
    print("\n--- inference (new, hallucinated names) ---")
    for i in range(20):
        ids = sample(model, weights, tokenizer.bos, 0.5, rng)
        print(f"sample {i + 1:2d}: {tokenizer.decode(ids)}")

# PART TWO: EFFICIENCY =====================================================================================

import atexit, gc, multiprocessing, os, signal, sys
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, compress
from operator import add, mul

# Part one spends its time on bookkeeping for single numbers. Whole matrices make a step nine times as fast,
# and the tricks of section 10 another 1.7 times (on CPython 3.11).

# 9. The same operations, a matrix at a time ---------------------------------------------------------------
# For a name of eight letters, part one puts 38,000 Values on the tape. A Tensor holds the numbers of a whole
# matrix, so part two puts only 18 there, one for each use of an operation. In place of slopes, a Tensor has a
# rule: a function that takes g, the gradient of the result, and passes on the gradients of the inputs. The
# comment above each operation derives its rule. The names, arguments, and (up to rounding) numbers are those
# of part one, so a model works with either kind of matrix.
#
# In the product A B of two matrices, each number is the dot product of a row of A and a column of B. W^T, the
# transpose of W, has the columns of W as rows. Below, matmul takes the rows of A and the columns of B, which
# are the rows of B^T. So A B is matmul(a, transpose(b)), and A B^T is matmul(a, b). As linear makes the dot
# products of the rows of X and the rows of W, it is X W^T, or matmul(x, w). We write Y for the result, g for
# its gradient, dX for the gradient of X, and x, y for single rows.

sumprod = getattr(math, "sumprod", lambda a, b: sum(map(mul, a, b)))  # math has it from Python 3.12 on

class Sparse(list):
    """Rows with many zeros, such as relu makes. Section 10 skips the zeros."""

def transpose(rows): return type(rows)(zip(*rows))  # Sparse stays Sparse
def add_rows(x, y): return [list(map(add, a, b)) for a, b in zip(x, y)]

def probabilities(scores):
    """Return the softmax of floats."""
    top = max(scores)
    exps = [math.exp(a - top) for a in scores]
    total = sum(exps)
    return [e / total for e in exps]

# Attention works on one head of one document at a time. The document [[1, 2], [3, 4]], split into two heads,
# is [[1], [3]] and [[2], [4]].

def split_heads(docs, n_head):
    """Return a matrix for each document and head."""
    size = len(docs[0][0]) // n_head
    heads = [slice(start, start + size) for start in range(0, n_head * size, size)]
    return [[row[head] for row in doc] for doc in docs for head in heads]

def join_heads(parts, n_head):
    """Undo split_heads, and return the rows of all documents in one list."""
    docs = [parts[i : i + n_head] for i in range(0, len(parts), n_head)]
    return [list(chain(*row)) for doc in docs for row in zip(*doc)]  # row: its parts, from all heads

class Tensor:
    """A matrix: rows of floats in data, and its gradient, of the same shape, in grad. A loss is one float."""
    def __init__(self, data, name=None, rule=None):
        self.data, self.name, self.rule = data, name, rule  # name: of the operation, for section 18
        self.received = None  # the sum of the gradients that have come in so far; None: all are zeros
        if rule:
            tape.append(self)

    @classmethod  # called as Tensor.wrap(rows), and FastTensor.wrap(rows) makes a FastTensor
    def wrap(cls, rows): return cls(rows)
    def result(self, name, data, rule): return type(self)(data, name, rule)
    backward = Value.backward  # walks the same tape, and sets the grad of the loss to 1

    def backprop(self):
        if self.received is not None:
            self.rule(self.received)

    def receive(self, grad):
        """Add grad to the gradient. Make new rows, since other matrices may share the old ones."""
        self.received = grad if self.received is None else add_rows(self.received, grad)

    @property
    def grad(self):
        return [[0.0] * len(row) for row in self.data] if self.received is None else self.received
    @grad.setter  # for backward
    def grad(self, grad): self.received = grad

    @staticmethod
    def matmul(rows, columns, mask=None):  # mask: only for section 10; ignored here
        """Return the product of two matrices, the first given by its rows and the second by its columns."""
        return [[sumprod(row, column) for column in columns] for row in rows]

    @classmethod
    def matmuls(cls, many_rows, many_columns):
        """Return the products of many pairs of matrices. (Section 12 needs them in one call.)"""
        return list(map(cls.matmul, many_rows, many_columns))

    # Each row of y is a copy of a row of weights, whose gradient is the sum of the rows of g at its copies.
    def embed(self, ids):
        def rule(g):
            grad = [[0.0] * len(g[0])] * len(self.data)  # the same row of zeros, until it is replaced
            for i, row in zip(ids, g):
                grad[i] = list(map(add, grad[i], row))
            self.receive(grad)
        return self.result("embed", [self.data[i] for i in ids], rule)

    # y = x + z. Both slopes are 1, so x and z each receive g.
    def __add__(self, other):
        def rule(g):
            self.receive(g)
            other.receive(g)
        return self.result("add", add_rows(self.data, other.data), rule)

    # In section 4, x = [1, 2] and the weights [3, 4] and [5, 6] gave y = [11, 17]. The 1 went into 11 with
    # slope 3 and into 17 with slope 5. So for g = [a, b], the gradient of x is [3 a + 5 b, 4 a + 6 b], or
    # dX = g W. The weight 3 went only into 11, with slope 1. So the gradient of the weights is [1 a, 2 a]
    # and [1 b, 2 b], added up over all rows of x: dW = g^T X.
    def linear(self, w):
        def rule(g):
            self.receive(self.matmul(g, transpose(w.data), self.data))
            w.receive(self.matmul(transpose(g), transpose(self.data)))
        return self.result("linear", self.matmul(self.data, w.data), rule)

    # y = s x, where s = M^-0.5 and M is the mean square + 1e-5. x[i] acts on y in two ways. It is a factor of
    # y[i], with slope s. And it moves M (slope 2 x[i] / n), M moves s (slope -M^-1.5 / 2 = -s^3 / 2), and s
    # moves every y[j] (slope x[j]). Along this path, the slope is -s^3 x[i] x[j] / n = -s y[i] y[j] / n.
    # Multiply by g[j], add up over j, and add s g[i]: dx[i] = s (g[i] - y[i] (y.g) / n), where y.g is the dot
    # product.
    def rmsnorm(self):
        scales = [(sumprod(row, row) / len(row) + 1e-5) ** -0.5 for row in self.data]
        y = [[a * scale for a in row] for row, scale in zip(self.data, scales)]
        def rule(g):
            out = []
            for g_row, y_row, scale in zip(g, y, scales):
                mean = sumprod(g_row, y_row) / len(y_row)
                out.append([scale * (a - mean * b) for a, b in zip(g_row, y_row)])
            self.receive(out)
        return self.result("rmsnorm", y, rule)

    # The slope of max(0, x) is 1 where x is positive, and 0 elsewhere.
    def relu(self):
        def rule(g):
            dx = [[b if a > 0 else 0.0 for a, b in zip(x, g_row)] for x, g_row in zip(self.data, g)]
            self.receive(Sparse(dx))
        return self.result("relu", Sparse([[a if a > 0 else 0.0 for a in row] for row in self.data]), rule)

    # For one head of one document of n rows, Q (the queries / sqrt(size), in place of the scores), K, V, Y,
    # and g are n x size, and S and P are n x n:
    #
    #     S = Q K^T    P = softmax of each row of S    Y = P V
    #
    # Y = P V is Y = X W^T with X = P and W = V^T. So dX = g W becomes dP = g V^T. And dW = g^T X becomes g^T
    # P, the gradient of V^T. Its transpose is dV = P^T g, as (A B)^T = B^T A^T. For the softmax, raise s[i]
    # by a small h. This multiplies e^s[i] by about 1 + h, and the sum by 1 + h p[i]. So p[i] gains h p[i],
    # and every p[j], including p[i], loses h p[i] p[j]. A change of p[j] changes the loss by dp[j] times as
    # much. Added up and divided by h: ds[i] = p[i] (dp[i] - p.dp). Then dQ = dS K and dK = dS^T Q, as in
    # linear, and the queries get dQ / sqrt(size). The rule assumes an empty cache, as in training.
    @staticmethod
    def softmax(s):
        """Return P from S. Each row gives 0 to the rows after it, which it must not see."""
        later = range(len(s) - 1, -1, -1)  # how many rows come after each
        return [probabilities(row[: len(row) - n]) + [0.0] * n for row, n in zip(s, later)]

    @staticmethod
    def softmax_rule(p, dp):
        """Return dS from P and dP."""
        sums = [sumprod(x, dx) for x, dx in zip(p, dp)]
        return [[a * (da - total) for a, da in zip(x, dx)] for x, dx, total in zip(p, dp, sums)]

    def attention(self, k, v, n_head, positions, cache):
        root = math.sqrt(len(self.data[0]) // n_head)
        # A document begins at position 0. (The first row may continue a document from an earlier call.)
        starts = [t for t, position in enumerate(positions) if t == 0 or position == 0]
        documents = [slice(start, end) for start, end in zip(starts, starts[1:] + [len(positions)])]
        queries, keys, values = [], [], []  # the rows of each document
        for span in documents:
            cache += zip(k.data[span], v.data[span])
            seen = cache[-1 - positions[span][-1] :]  # all that its last row sees, from any call
            queries.append([[a / root for a in row] for row in self.data[span]])  # Q
            keys.append([key for key, _ in seen])
            values.append([value for _, value in seen])
        qs, ks, vs = [split_heads(docs, n_head) for docs in (queries, keys, values)]
        ps = list(map(self.softmax, self.matmuls(qs, ks)))                        # from S = Q K^T
        ys = self.matmuls(ps, map(transpose, vs))                                 # P V

        def rule(g):
            gs = split_heads([g[span] for span in documents], n_head)
            dvs = self.matmuls(map(transpose, ps), map(transpose, gs))            # P^T g
            dps = self.matmuls(gs, vs)                                            # g V^T
            dss = list(map(self.softmax_rule, ps, dps))
            dqs = self.matmuls(dss, map(transpose, ks))                           # dS K
            dks = self.matmuls(map(transpose, dss), map(transpose, qs))           # dS^T Q
            self.receive([[a / root for a in row] for row in join_heads(dqs, n_head)])
            k.receive(join_heads(dks, n_head))
            v.receive(join_heads(dvs, n_head))
        out = self.result("attention", join_heads(ys, n_head), rule)
        out.shares = ps  # for --explain
        return out

    # The loss of a row of scores z is log(sum of e^z) - z[target]. The first term has the slopes
    # e^z / sum = p, and the second has the slope -1 at the target. So with n rows, dz = g (p - 1) / n there,
    # and g p / n elsewhere.
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
        return self.result("cross_entropy", loss / len(targets), rule)

# 10. Faster products --------------------------------------------------------------------------------------
# Most of the time goes to dot products, and most of that to the interpreter's loop, not to arithmetic. Three
# tricks help. First, we write the loop out: for vectors of length 3, we let Python compile this function,
# once. (The comma before "in" is for length 1.)
#
#     def product(rows, columns):
#         out = []
#         for a0,a1,a2, in rows:
#             row = []
#             for b0,b1,b2, in columns:
#                 row.append(a0*b0+a1*b1+a2*b2)
#             out.append(row)
#         return out
#
# Second, in a trained model, relu makes six numbers out of seven 0, and in the same places, the gradient that
# it passes back is 0. Products with either skip the zeros.
#
# Third, in these places, relu passes back 0, whatever it receives. So the next linear need not compute its dX
# there. It hands X to matmul as a mask, and where the mask is 0, the product stays 0.
#
# Written out, a step is 1.5 times as fast on CPython 3.11 and on PyPy, a Python with a compiler of its own,
# but only 1.1 times on Python 3.12, whose math.sumprod is a fast loop. On CPython 3.11, skipping adds 1.15
# times with 16 channels and 1.33 with 64, the mask 1.04 and 1.12; on PyPy, neither gains. To try it all, pass
# FastTensor as the last argument of loss_and_grads in section 8, and call fast_adam there, which adds 1.1
# times: the minute becomes four seconds.

PYPY = sys.implementation.name == "pypy"
LONGEST = 256 if PYPY else 15 if hasattr(math, "sumprod") else 64  # for longer vectors, a loop is as fast

@lru_cache(maxsize=None)
def products(n):
    """Return a matmul for rows and columns of length n, written out unless n exceeds LONGEST."""
    if n > LONGEST:
        return Tensor.matmul
    a, b = [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)]
    terms = "+".join([f"{x}*{y}" for x, y in zip(a, b)])
    source = f"""def product(rows, columns):
        out = []
        for {','.join(a)}, in rows:
            row = []
            for {','.join(b)}, in columns:
                row.append({terms})
            out.append(row)
        return out"""
    exec(source, names := {})  # runs the source, which puts product into names
    return names["product"]

def sparse_product(rows, columns):
    """Return the product, skipping the zeros in the rows."""
    out, inner = [], transpose(columns)
    for row in rows:
        numbers = [*compress(row, row)]            # of [0, 3, 0, 5], compress keeps [3, 5]
        kept = transpose([*compress(inner, row)])  # of each column, what meets the 3 and the 5
        out += products(len(numbers))([numbers], kept) if numbers else [[0.0] * len(columns)]
    return out

def masked_product(rows, columns, mask):
    """Return the product, but 0 where the mask is 0."""
    out, product = [], products(len(rows[0]))
    for row, mask_row in zip(rows, mask):
        numbers = iter(product([row], [*compress(columns, mask_row)])[0])  # one for each place without a 0
        out.append([next(numbers) if a else 0.0 for a in mask_row])
    return out

class FastTensor(Tensor):
    """The engine `tensor`: a Tensor with faster products."""
    @staticmethod
    def matmul(rows, columns, mask=None):
        """Return the product, as Tensor.matmul does. Where a Sparse mask is 0, it may be 0 instead."""
        if PYPY:
            return products(len(rows[0]))(rows, columns)
        if isinstance(mask, Sparse):  # mlp_fc2: dX
            return masked_product(rows, columns, mask)
        if isinstance(rows, Sparse):  # mlp_fc2: Y. mlp_fc1: dX and dW
            return sparse_product(rows, columns)
        if isinstance(columns, Sparse):  # mlp_fc2: dW. A B is the transpose of B^T A^T.
            return transpose(sparse_product(columns, rows))
        return products(len(rows[0]))(rows, columns)

def rows_of(*dictionaries):
    """Yield the corresponding rows of weights, gradients, and running means."""
    for name in dictionaries[0]:
        yield from zip(*[each[name] for each in dictionaries])

def fast_adam(weights, grads, m, v, step, lr, beta1=0.85, beta2=0.99, eps=1e-8):
    """Do what adam does, but compute once what all weights share. With c and d as below, a weight's move
    lr * (m / d) / (sqrt(v) / c + eps) is the same as (lr * c / d) * m / (sqrt(v) + c * eps)."""
    new1, new2, sqrt = 1 - beta1, 1 - beta2, math.sqrt
    c, d = sqrt(1 - beta2 ** (step + 1)), 1 - beta1 ** (step + 1)
    lr = lr * c / d
    eps *= c
    for row, g, m_row, v_row in rows_of(weights, grads, m, v):
        for i, gi in enumerate(g):
            m_row[i] = mi = beta1 * m_row[i] + new1 * gi
            v_row[i] = vi = beta2 * v_row[i] + new2 * gi * gi
            row[i] -= lr * mi / (sqrt(vi) + eps)

# 11. Subwords ---------------------------------------------------------------------------------------------
# Characters are few, and each says little. Byte-pair encoding (Gage 1994; Sennrich et al. 2016) makes longer
# tokens: the pair of neighbors that occurs most often becomes a token of its own, again and again. In
# "banana", the pairs are ba (once), an (twice), and na (twice). On a tie, the pair with the smaller ids wins,
# here an, and the text becomes b [an] [an] a, in which no pair occurs twice. The first merges of input.txt
# are an, ar, in, en, and er; after 20, emma is e m ma. Here, a document is a string of chr(id), and a pair is
# a string of two, so Python's own replace() can merge it, from left to right.

def learn_merges_slowly(docs, n, first_id):
    """Return n merges, (left id, right id), or fewer if no pair occurs twice. New ids begin at first_id."""
    merges = []
    while len(merges) < n:
        counts = Counter(pair for doc in docs for pair in map(add, doc, doc[1:]))
        pair, count = min(counts.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
        if count < 2:
            break
        docs = [doc.replace(pair, chr(first_id + len(merges))) for doc in docs]
        merges.append((ord(pair[0]), ord(pair[1])))
    return merges

# This function counts all pairs anew for every merge: 200 merges of input.txt take 1.3 seconds. The next one
# takes 0.04 seconds, because it counts once, and then corrects only the counts of pairs next to a replaced
# pair. With M for ab, xababy becomes xMMy. To find what has changed, the function splits the text at ab, into
# the pieces x, "", and y: the last letter of x now meets M, not a; the first letter of y follows M, not b;
# and at the empty piece, MM has replaced abab, which had ba in the middle.
#
# To find the most frequent pair, the function keeps pairs on a heap, a list from which the smallest entry is
# quick to take, here the entry with the lowest -count. Once a pair is on the heap, its count can only fall,
# since later merges make only pairs with newer tokens. Its entry stays, so an entry may claim too much, but
# never too little. If the entry that comes up agrees with the count, no pair has more; otherwise, the
# function corrects the entry and puts it back.

BETWEEN = chr(0x10FFFF)  # stands between documents and is part of no pair

def learn_merges(docs, n, first_id):
    """Return what learn_merges_slowly does."""
    text, merges = BETWEEN.join(docs), []
    counts = Counter(pair for pair in map(add, text, text[1:]) if BETWEEN not in pair)
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapify(heap)
    while heap and len(merges) < n:
        minus_count, pair = heappop(heap)
        if -minus_count != counts[pair]:
            if counts[pair] > 1:
                heappush(heap, (-counts[pair], pair))
            continue
        (left, right), merged = pair, chr(first_id + len(merges))
        merges.append((ord(left), ord(right)))
        pieces = text.split(pair)
        text = merged.join(pieces)
        touching = pieces[1:-1].count("")  # how often two of the pair stand side by side
        changes = Counter({merged + merged: touching, right + left: -touching})
        for char, times in Counter(piece[-1] for piece in pieces[:-1] if piece).items():
            changes[char + left] -= times  # char left is now char merged
            changes[char + merged] += times
        for char, times in Counter(piece[0] for piece in pieces[1:] if piece).items():
            changes[right + char] -= times  # right char is now merged char
            changes[merged + char] += times
        for other, change in changes.items():
            if BETWEEN not in other:
                counts[other] += change
                if change > 1:  # only pairs with the new token gain, and they are new: change is the count
                    heappush(heap, (-change, other))
        counts[pair] = 0  # in aaa, the pair aa was counted twice, though only one could be replaced
    return merges

class BPETokenizer(CharTokenizer):
    """A CharTokenizer with one more token for each merge. BOS stays the last id. To make one with 20 merges:
        chars = BPETokenizer(docs)
        tokenizer = BPETokenizer(docs, learn_merges(chars.merge(docs), 20, len(chars.ids)))"""
    def __init__(self, docs, merges=()):
        super().__init__(docs)
        self.merges = merges
        for left, right in merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])
        self.bos = len(self.tokens)
        self.vocab_size = len(self.tokens) + 1

    def merge(self, docs):
        """Return merged documents, as strings of chr(id). Leave out unknown characters."""
        ids = {char: chr(i) for char, i in self.ids.items()}
        text = BETWEEN.join(["".join([ids[char] for char in doc if char in ids]) for doc in docs])
        for new, (left, right) in enumerate(self.merges, len(self.ids)):
            text = text.replace(chr(left) + chr(right), chr(new))
        return text.split(BETWEEN) if docs else []

    def encode(self, text):
        """Return the ids of a text. Raise UserError (section 12) for a character that no document has."""
        unknown = [f"{char!r} (U+{ord(char):04X})" for char in sorted(set(text).difference(self.ids))]
        require(not unknown, "the model was trained without " + ", ".join(unknown))
        return list(map(ord, self.merge([text])[0]))

# 12. The GPU ----------------------------------------------------------------------------------------------
# A GPU multiplies thousands of numbers at once, to about 7 digits, but the data must travel there and back.
# These times for a product of m x k by k x n numbers are from CPython 3.12 and an NVIDIA H200:
#
#                 the trip    for each of m k + k n + m n numbers    for each of m n k multiplications
#     Python      0           0                                      20 ns
#     the GPU     0.3 ms      25 ns, to pack it                      less than 0.1 ns
#
# With m = k = n = 26, both take 0.35 ms; with 128, Python takes 42 ms and the GPU 1.6. A trip costs as much
# for many products as for one, so all documents and heads share a trip. The engine `vulkan`, named after an
# interface to the GPUs of most makers, needs a second file, vulkan_gemm.py. It measures these costs at the
# start, and sends only products that the GPU makes faster.

# A file may be missing, and so may a GPU. These helpers turn any error into one line that says so.

class UserError(RuntimeError):
    """A problem that the user can fix, reported in one line."""

def require(condition, what, error=UserError):
    """Raise an error that says what is wrong, unless the condition holds."""
    if not condition:
        raise error(what)

def reason(error):
    """Return what to say about an error. An OSError has a strerror; a MemoryError has no text."""
    return getattr(error, "strerror", None) or str(error) or "there is not enough memory"

@contextmanager
def reporting(what):
    """Turn any error into a UserError that says what cannot be done, and why."""
    try:
        yield  # here the body of the with statement runs
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from None

@lru_cache(maxsize=None)  # only the first call starts the GPU
def gpu_matmuls():
    """Return a version of matmuls that uses the GPU. Raise UserError if there is none."""
    with reporting("cannot use a GPU (--engine tensor needs none)"):
        from vulkan_gemm import VulkanGemm, offload
        gpu = VulkanGemm()
    atexit.register(gpu.close)
    return offload(gpu, FastTensor.matmuls)  # for each call, the faster of the two

class VulkanTensor(FastTensor):
    """The engine `vulkan`: a FastTensor with its large products on the GPU."""
    @classmethod
    def matmul(cls, rows, columns, mask=None): return cls.matmuls([rows], [columns])[0]
    @classmethod
    def matmuls(cls, many_rows, many_columns): return gpu_matmuls()(list(many_rows), list(many_columns))

ENGINES = {"scalar": Matrix, "tensor": FastTensor, "vulkan": VulkanTensor}

# 13. All the cores ----------------------------------------------------------------------------------------
# A Python program usually keeps only one core busy, so we split a batch (--batch-size, in part three) among
# processes: this one and its workers. A process is a running program with memory of its own, so a worker
# cannot see our variables. A pipe connects two processes. It has two ends: here.send(x) puts a copy of x in
# at ours, there.recv() waits for it and takes it out at the worker's, and likewise in the other direction.
#
# At each step, every worker gets the weights and a share of the batch, and sends back the loss and the
# gradients of its share. Meanwhile, this process works on a share of its own. The loss of the batch is the
# mean over all predictions: a loss of 2 over 6 predictions and one of 3 over 4 make 0.6 * 2 + 0.4 * 3 = 2.4.
# The gradients are averaged likewise.
#
# A worker begins as a copy of this process (fork) or, if fork is missing or unsafe (the copy of a process
# that uses a GPU or threads may hang), as a new Python that imports this file (spawn). It waits in recv for
# the next message. If this process ends, its end of the pipe closes, recv fails, and the worker ends, too.
# But an end counts as closed only when nobody holds a copy of it, and fork copies all ends that are open at
# that moment. So a forked worker first closes its copies of our ends (parent_ends).

# Ctrl-C and other signals ask a program to stop, and may reach the workers, too. Workers ignore them, so that
# this process can finish its step. (No system has all of these signals. You can skip signals_wait.)
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGXCPU")
         if hasattr(signal, name)]

@contextmanager
def signals_wait(context):
    """Hold signals back while workers start, since a signal would end a worker that cannot ignore it yet."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    if context.get_start_method() == "spawn":
        from multiprocessing import resource_tracker  # a helper process of spawn
        resource_tracker.ensure_running()  # its start would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

def predictions(batch): return sum(len(tokens) - 1 for tokens in batch)  # nothing predicts a first token

def scaled(grads, factor):
    """Return the gradients times a factor."""
    return {name: [[g * factor for g in row] for row in rows] for name, rows in grads.items()}

def part_of(model, weights, share, total, engine):
    """Return what a share adds to the loss and the gradients of a batch, which has `total` predictions."""
    part = predictions(share) / total
    loss, grads = loss_and_grads(model, weights, share, engine)
    return part * loss, scaled(grads, part)

def work(pipe, parent_ends, engine):
    """Answer the arguments that come through the pipe with what part_of returns, or with an error."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # only the parent handles signals
    for end in parent_ends:
        end.close()  # the copies that fork made
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            arguments = pipe.recv()
            try:
                answer = part_of(*arguments, engine)
            except Exception as error:
                answer = error
            pipe.send(answer)

class Workers:
    """Processes that share the work of loss_and_grads: this one, and n - 1 workers."""
    def __init__(self, n, engine):
        self.engine, self.processes, self.pipes = engine, [], []
        if n == 1:
            return
        context = multiprocessing.get_context(
            "fork" if sys.platform == "linux" and engine is not VulkanTensor else "spawn")
        try:
            with reporting("cannot start the workers"), signals_wait(context):
                for _ in range(n - 1):
                    here, there = context.Pipe()
                    self.pipes.append(here)
                    parent_ends = self.pipes if context.get_start_method() == "fork" else []
                    process = context.Process(target=work, args=(there, parent_ends, engine), daemon=True)
                    process.start()  # daemon: Python does not wait for it at the end
                    self.processes.append(process)
                    there.close()  # now only the worker holds it: if the worker dies, our recv fails
        except BaseException:
            self.stop()
            raise

    def loss_and_grads(self, model, weights, batch):
        """Return what loss_and_grads does, for a batch of n documents or more. Raise UserError if a worker
        dies."""
        if not self.pipes:
            return loss_and_grads(model, weights, batch, self.engine)
        n, total = len(self.pipes) + 1, predictions(batch)
        own, *others = [batch[i::n] for i in range(n)]  # shares
        try:
            for pipe, share in zip(self.pipes, others):
                pipe.send((model, weights, share, total))
            loss, grads = part_of(model, weights, own, total, self.engine)
            for pipe in self.pipes:
                answer = pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                loss += answer[0]
                for row, other in rows_of(grads, answer[1]):
                    row[:] = map(add, row, other)
        except (EOFError, OSError):
            raise UserError("a worker has died") from None
        return loss, grads

    def stop(self):
        """End all workers."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

# PART THREE: A TOOL FOR EVERYDAY USE ======================================================================

import argparse, datetime, hashlib, json, shlex, shutil, struct, time, unicodedata
from glob import glob
from heapq import nlargest
from inspect import signature
from itertools import product, takewhile

# 14. GPT-2 as published -----------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019; --arch gpt2) has the same layers as part one, with these differences:
#
#     LayerNorm for RMSNorm    It also subtracts the mean: [1, 3] becomes [-1, 1]. (Ba et al. 2016)
#     gain and bias            Each norm has learned factors and offsets, so that training can set the scale.
#     a bias in each linear    It is added to the sums, so that a row of zeros need not give zeros.
#     GELU for relu            2, 0, -2 become 1.95, 0, -0.05: like relu, but some gradient passes below 0.
#     a norm at the end        It replaces the first norm. The logits have the same scale at any depth.
#     wte serves as lm_head    Both have a row for each token. wte gets the gradients of both uses.
#     small weights            Their first standard deviation is 0.02, not 0.08. For attn_wo and mlp_fc2,
#                              whose 2 n_layer results add up in x, it is 0.02 / sqrt(2 n_layer). (OpenAI's
#                              code has 0.01 for wpe.)
#
# Dropout, which sets random channels to 0 in training, is left out. A gain or a bias is a matrix with one
# row, which embed() repeats.

def center(x):
    """Return x minus the mean of each row, without a new rule: for [1, 3], one linear makes [2], the mean,
    and another makes [-2, -2]."""
    n, wrap = len(x.data[0]), type(x).wrap
    return x + x.linear(wrap([[1 / n] * n])).linear(wrap([[-1.0]] * n))

def times(a, b): return [list(map(mul, x, y)) for x, y in zip(a, b)]

# y = x z, number by number. The slope for x is z, and the slope for z is x.
def multiply(x, z):
    if isinstance(x, Matrix):
        return Matrix(times(x.rows, z.rows))
    def rule(g):
        x.receive(times(g, z.data))
        z.receive(times(g, x.data))
    return x.result("multiply", times(x.data, z.data), rule)

# y = x (1 + t) / 2. Here t = tanh(u) climbs from -1 to 1, with the slope 1 - t^2, and u = c (x + k x^3) has
# the slope c (1 + 3 k x^2). The slope of t for x is the product of both, and that of y is half of 1 + t plus
# x times the slope of t.
def gelu_and_slope(x):
    """Return the GELU of x by the tanh formula (Hendrycks and Gimpel 2016), and the slope at x."""
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = math.tanh(c * (x + k * x * x * x))
    slope = (1 - t * t) * c * (1 + 3 * k * x * x)  # of t
    return x * (1 + t) / 2, (1 + t + x * slope) / 2

def gelu(x):
    if isinstance(x, Matrix):
        def gelu_of(a):
            y, slope = gelu_and_slope(a.data)
            return Value(y, (a,), (slope,))
        return Matrix([[gelu_of(a) for a in row] for row in x.rows])
    pairs = [[gelu_and_slope(a) for a in row] for row in x.data]
    y = [[value for value, _ in row] for row in pairs]
    slopes = [[slope for _, slope in row] for row in pairs]
    return x.result("gelu", y, lambda g: x.receive(times(g, slopes)))

class GPT2(GPT):
    """A GPT with the weights and operations of GPT-2."""
    def shapes(self):
        out = super().shapes()
        del out["lm_head"]
        linears = [name for name in out if name.startswith("layer")]
        norms = [f"layer{i}.{name}" for i in range(self.n_layer) for name in ("ln1", "ln2")]
        for name in linears:
            out[name + ".bias"] = (1, out[name][0])
        for name in ["ln_f", *norms]:  # ln: layer norm, f: final
            out[name] = out[name + ".bias"] = (1, self.n_embd)
        return out

    def initial_weights(self, rng):
        weights = {}
        for name, (rows, columns) in self.shapes().items():
            if name.endswith(".bias"):
                weights[name] = [[0.0] * columns]
            elif "ln" in name:  # a gain
                weights[name] = [[1.0] * columns]
            else:
                small = name.endswith(("attn_wo", "mlp_fc2"))
                scale = 0.02 / math.sqrt(2 * self.n_layer) if small else 0.02
                weights[name] = [[rng.gauss(0, scale) for _ in range(columns)] for _ in range(rows)]
        return weights

    def logits(self, w, ids, positions, cache):
        def repeat(name): return w[name].embed([0] * len(ids))
        def linear(x, name): return x.linear(w[name]) + repeat(name + ".bias")
        def layernorm(x, name): return multiply(center(x).rmsnorm(), repeat(name)) + repeat(name + ".bias")
        x = w["wte"].embed(ids) + w["wpe"].embed(positions)                         # rows x n_embd
        for i in range(self.n_layer):
            layer = f"layer{i}."
            normed = layernorm(x, layer + "ln1")
            q, k, v = [linear(normed, layer + name) for name in ("attn_wq", "attn_wk", "attn_wv")]
            found = q.attention(k, v, self.n_head, positions, cache[i])
            x = x + linear(found, layer + "attn_wo")
            hidden = gelu(linear(layernorm(x, layer + "ln2"), layer + "mlp_fc1"))  # rows x 4 n_embd
            x = x + linear(hidden, layer + "mlp_fc2")
        return layernorm(x, "ln_f").linear(w["wte"])                               # rows x vocab_size

MODELS = {"microgpt": GPT, "gpt2": GPT2}

# 15. Optimizers in historical order -----------------------------------------------------------------------
# Each was meant to improve on the ones before. g is the gradient of a weight w. The default run, with the
# learning rate 0.01, reaches these losses on unseen names (--val-fraction 0.1 --optimizer NAME):
#
#     sgd 2.64    momentum 2.51    rmsprop 2.49    adam 2.50    adamw 2.50
#
# But each needs a learning rate of its own. The m of momentum is a sum, up to 1 / 0.15 = 6.7 times a
# gradient, and SGD with 0.067 reaches 2.51, too. With 0.3, SGD reaches 2.49; at 1, it overflows. Adam is
# less sensitive: 2.55 with 0.001, and 2.52 with 0.05.

# w -= lr g: steps downhill along the gradient of a few documents (Robbins and Monro 1951)
def sgd(weights, grads, m, v, step, lr):
    for w, g in rows_of(weights, grads):
        w[:] = [a - lr * b for a, b in zip(w, g)]

# m = beta1 m + g, w -= lr m: keeps going in the previous direction (Polyak 1964)
def momentum(weights, grads, m, v, step, lr, beta1=0.85):
    for w, g, m_row in rows_of(weights, grads, m):
        for i in range(len(w)):
            m_row[i] = beta1 * m_row[i] + g[i]
            w[i] -= lr * m_row[i]

# v = beta2 v + (1 - beta2) g^2, w -= lr g / sqrt(v): divides by the usual size (Tieleman and Hinton 2012)
def rmsprop(weights, grads, m, v, step, lr, beta2=0.99, eps=1e-8):
    for w, g, v_row in rows_of(weights, grads, v):
        for i in range(len(w)):
            v_row[i] = beta2 * v_row[i] + (1 - beta2) * g[i] * g[i]
            w[i] -= lr * g[i] / (math.sqrt(v_row[i]) + eps)

# Adam (section 6) does both, with corrected means. AdamW (Loshchilov and Hutter 2019) first pulls each weight
# toward 0, by w -= lr weight_decay w, so that only weights that are needed stay large.
def adamw(weights, grads, m, v, step, lr, beta1=0.85, beta2=0.99, eps=1e-8, weight_decay=0.01):
    for (w,) in rows_of(weights):  # (w,): a tuple of one
        w[:] = [a - lr * weight_decay * a for a in w]
    fast_adam(weights, grads, m, v, step, lr, beta1, beta2, eps)

OPTIMIZERS = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": fast_adam, "adamw": adamw}
# The settings of an optimizer are its arguments after the six that all share.
SETTINGS = {name: list(signature(optimizer).parameters)[6:] for name, optimizer in OPTIMIZERS.items()}

# A schedule scales the learning rate as `done` goes from 0 to 1. With --warmup-steps, the rate rises first,
# while the running means are rough: of 110 steps with 10 of warmup, the 5th has half of it, the 10th has all,
# and the 61st half of it (linear or cosine).
SCHEDULES = {"linear": lambda done: 1 - done, "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
             "constant": lambda done: 1}

def learning_rate(args, step):
    """Return the learning rate of a step, which counts from 0. args.lr is the value of --lr, and so on."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    return args.lr * SCHEDULES[args.schedule](done)

def norm(grads):
    """Return the length of the vector of all gradients."""
    return math.sqrt(sum(sumprod(row, row) for (row,) in rows_of(grads)))

def clip(grads, limit):
    """Return the gradients, scaled down if their norm exceeds the limit: no odd batch may outweigh many."""
    return scaled(grads, limit / max(norm(grads), limit))

# 16. Sampling ---------------------------------------------------------------------------------------------
# Section 7 draws from all tokens. Two flags make sampling more careful. With --temperature 0, we take the
# likeliest token. With --top-k, we draw only from the k likeliest, so that no odd token spoils a text: of
# the scores 2, 1, 0, --top-k 2 leaves the first two, with probabilities of 0.73 and 0.27 at temperature 1.
#
# A text can outgrow the context. When all positions are taken, the model starts over at position 0 with the
# end of the text, half a context long. With a context of 4, if e follows "abcd", the model next reads "de".

class Overflow(ArithmeticError):
    """The numbers of the model have become too large."""

def check_finite(numbers, when=""):
    """Raise Overflow if a number is infinite or undefined."""
    finite = all(map(math.isfinite, numbers))
    require(finite, f"{when}the model's numbers have overflowed: train it with a lower --lr", Overflow)

def draw(logits, temperature, top_k, rng):
    """Return a token id, drawn from the top_k likeliest (0: from all)."""
    check_finite(logits)
    top = max(logits)
    if temperature == 0:
        return logits.index(top)
    candidates = range(len(logits))
    if top_k:
        candidates = sorted(nlargest(top_k, candidates, key=lambda i: logits[i]))  # by id, as without top_k
    odds = [math.exp((logits[i] - top) / temperature) for i in candidates]
    return rng.choices(candidates, weights=odds)[0]

def continuation(model, w, ids, bos, rng, temperature=0.5, top_k=0, max_tokens=None):
    """Yield the ids with which the model continues: until BOS, at most max_tokens (None: block_size)."""
    size, text, cache = model.block_size, list(ids), model.new_cache()
    unread, position = text[:], 0  # the ids to read next, and the position of the first
    for _ in range(size if max_tokens is None else max_tokens):
        if position + len(unread) > size:  # no position is left: start over with the last half context
            unread, position, cache = text[-size // 2 :], 0, model.new_cache()
        logits = model.logits(w, unread, range(position, position + len(unread)), cache).data[-1]
        tape.clear()
        position += len(unread)
        token = draw(logits, temperature, top_k, rng)
        if token == bos:
            return
        yield token
        text.append(token)
        unread = [token]

# After the default run with --save FILE, you can ask a Run what it has learned:
#
#     from microgpt import load
#     run = load(FILE)
#     run.probabilities("em")["m"]    the probability that m comes after em, 0.038
#     run.loss("emma")                the mean loss over its tokens, 2.511
#     run.generate("em")              emis, or another name that begins with em

class Run:
    """A training run: its settings (args, from the flags of section 20), and all that it needs to go on."""
    def __init__(self, args, tokenizer, rng, weights=None):
        self.args, self.tokenizer, self.rng = args, tokenizer, rng
        sizes = args.n_layer, args.n_embd, args.n_head, args.block_size
        self.model = MODELS[args.arch](tokenizer.vocab_size, *sizes)
        self.weights = self.model.initial_weights(rng) if weights is None else weights
        self.m, self.v = zeros(self.weights), zeros(self.weights)
        self.boundary = [] if args.stream else [tokenizer.bos]  # around each document; a stream has none
        self.step = 0          # steps made so far
        self.losses = []       # (step, loss); a long run leaves out some steps
        self.validations = []  # (step, validation loss)
        self.recent = []       # the losses since the last validation
        self.corpus = None     # facts about the text that it is trained on
        self.saved = None      # the step last saved
        self.saved_at = time.perf_counter()  # when it was last saved, or tried to

    def wrap(self, engine=None):
        engine = engine or ENGINES[self.args.engine]
        return {name: engine.wrap(rows) for name, rows in self.weights.items()}

    def encode(self, text):
        """Return the ids of a text, after BOS unless the corpus is a stream."""
        return self.boundary + self.tokenizer.encode(text)

    def generate(self, prompt="", temperature=0.5, top_k=0, max_tokens=None, rng=None):
        """Return the prompt and what the model adds to it, at most max_tokens tokens (None: block_size)."""
        ids = self.encode(prompt) or [self.tokenizer.ids.get("\n", 0)]  # a stream begins after a newline
        new = continuation(self.model, self.wrap(), ids, self.tokenizer.bos, rng or self.rng,
                           temperature, top_k, max_tokens)
        return prompt + self.tokenizer.decode(new)

    def logits_of(self, ids):
        """Return the logits after each id, as floats: rows x vocab_size. Leave the operations on the tape."""
        tape.clear()
        size = self.model.block_size
        require(0 < len(ids) <= size, f"the context takes from 1 to {size} tokens, not {len(ids)}")
        rows = self.model.logits(self.wrap(FastTensor), ids, range(len(ids)), self.model.new_cache()).data
        check_finite(chain(*rows))
        return rows

    def probabilities(self, prompt=""):
        """Return token -> the probability that it follows the prompt. The token "" is the end."""
        logits = self.logits_of(self.encode(prompt))[-1]
        tape.clear()
        return dict(zip([*self.tokenizer.tokens, ""], probabilities(logits)))  # the function of section 9

    def loss(self, text):
        """Return the mean loss over the tokens of a text, including its end."""
        ids = self.encode(text) + self.boundary
        loss = Tensor(self.logits_of(ids[:-1])).cross_entropy(ids[1:]).data
        tape.clear()
        return loss

    def save(self, path=None):
        """Write a checkpoint, by default to the file of --save. (Section 17 tells how.)"""
        path = path or self.args.save
        require(path, "save needs a path, since this run has no --save")
        save_run(self, path)

# 17. Checkpoints ------------------------------------------------------------------------------------------
# A run is kept in one .safetensors file, which other programs can open and which, unlike Python's pickle,
# cannot run code. It holds the length of the header, the header, and the numbers. The header is JSON: the
# metadata (strings), and the type, shape, and place of each matrix. With only w = [[1.0]] in it (a single row
# counts as a vector), a file is these 88 bytes:
#
#     48 00 00 00 00 00 00 00        72, the length of the header, lowest byte first
#     {"__metadata__":{},"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}
#     00 00 00 00 00 00 f0 3f        1.0

def write_safetensors(path, tensors, metadata):
    """Write tensors (name -> rows of floats) and metadata (name -> string)."""
    header, numbers, end = {"__metadata__": metadata}, [], 0
    for name, rows in tensors.items():
        start, end = end, end + 8 * len(rows) * len(rows[0])
        shape = [len(rows), len(rows[0])]
        if len(rows) == 1:
            shape = shape[1:]  # a gain or a bias is a vector
        header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [start, end]}
        numbers += [struct.pack(f"<{len(row)}d", *row) for row in rows]  # "<3d" packs three floats
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # spaces, up to a multiple of 8 (-13 % 8 is 3)
    replace_file(path, [len(text).to_bytes(8, "little"), text, *numbers])

def replace_file(path, parts):
    """Write byte strings to a new file beside `path`, and rename it to `path` only once it is whole and on
    disk. So one intact copy always survives."""
    target = os.path.realpath(path)  # for a link, replace what it points to
    new = os.path.join(os.path.dirname(target), f"{os.getpid()}.{time.time_ns()}.part")
    with reporting(f"cannot save {path}"):
        try:
            with open(new, "xb") as file:  # x: the file must be new
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            if os.path.exists(target):
                shutil.copymode(target, new)
            os.replace(new, target)
        finally:
            with suppress(OSError):
                os.remove(new)  # which is there only after an error

def read_header(file):
    """Return the metadata, and name -> type, shape, and place, from an open .safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size
    require(8 + length <= size, "it is cut short, or not a .safetensors file")
    header = json.loads(file.read(length))
    require(isinstance(header, dict), "it is not a .safetensors file")
    metadata = header.pop("__metadata__", {})
    return metadata, header

def read_safetensors(path):
    """Return name -> rows of floats, and the metadata."""
    with open(path, "rb") as file:
        metadata, header = read_header(file)
        numbers = file.read()
    end = max([entry["data_offsets"][1] for entry in header.values()], default=0)
    require(len(numbers) == end, "it is cut short, or too long")
    tensors = {}
    for name, entry in header.items():
        require(entry["dtype"] in ("F32", "F64"), f"it holds {entry['dtype']}, not F32 or F64")
        kind = "f" if entry["dtype"] == "F32" else "d"
        layout = f"<{entry['shape'][-1]}{kind}"  # of a row
        start, end = entry["data_offsets"]
        tensors[name] = [list(row) for row in struct.iter_unpack(layout, numbers[start:end])]
    return tensors, metadata

# What does a checkpoint keep of a Run? The tensors are its weights, m, and v. The metadata are facts, in
# JSON. These are some of them after python microgpt.py --steps 50 --save run.safetensors:
#
#     flags         ["--corpus=/.../input.txt", ...]            the settings, as words of a command line
#     characters    "abcdefghijklmnopqrstuvwxyz"                for the tokenizer, with the merges
#     random        [3, [1554875599, 4042633355, ...], null]    the state of the random generator
#     losses        [[1, 3.520], [2, 3.493], ...]               (step, loss)
#
# The flags are words, so that the program can read files of earlier versions: a new flag gets its default.

PROGRESS = "step", "recent", "losses", "validations", "corpus"  # what a Run knows of its steps so far
TUNED = "autotune", "batch_sizes", "worker_counts"  # only for --autotune
THIS_TIME = "save", "resume", "plot", "trace", "explain", *TUNED  # flags that no later command inherits

def as_argv(flags):
    """Return flags as words of a command line: {"steps": 50, "stream": True} as --steps=50 and --stream."""
    words = []
    for name, value in flags.items():
        word = "--" + name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False:  # but 0 is a value
                words.append(word if each is True else f"{word}={each}")
    return words

def facts_of(run):
    """Return all that describes a Run, except its matrices."""
    flags = {name: value for name, value in vars(run.args).items() if name not in THIS_TIME}
    progress = {name: getattr(run, name) for name in PROGRESS}
    return {"flags": as_argv(flags), "characters": "".join(run.tokenizer.ids),
            "merges": run.tokenizer.merges, "random": run.rng.getstate(),
            "config": vars(run.model), **progress}  # config: for other programs

def save_run(run, path):
    """Write a checkpoint. Raise Overflow if a number is not finite."""
    run.saved_at = time.perf_counter()
    tensors = dict(run.weights)
    for name in run.weights:
        tensors["optimizer.m." + name] = run.m[name]
        tensors["optimizer.v." + name] = run.v[name]
    for (row,) in rows_of(tensors):
        check_finite(row, f"at step {run.step}, ")
    metadata = {name: json.dumps(value) for name, value in facts_of(run).items()}
    write_safetensors(path, tensors, {"format": "pt", **metadata})  # pt: PyTorch, which can open it
    run.saved = run.step

def run_from(metadata):
    """Return a Run, still without matrices, from the metadata of a checkpoint."""
    require("flags" in metadata, "it was not saved by this program: no flags in its metadata")
    names = "flags", "characters", "merges", "random", *PROGRESS
    facts = {name: json.loads(metadata[name]) for name in names if name in metadata}
    args = FLAGS.parse_args(facts["flags"])  # section 20 has FLAGS, which turns words into settings
    run = Run(args, BPETokenizer(facts["characters"], facts["merges"]), random.Random(), {})
    version, words, spare = facts["random"]
    run.rng.setstate((version, tuple(words), spare))  # JSON has made a list of the tuple
    for name in PROGRESS:
        if name in facts:  # earlier versions lack some
            setattr(run, name, facts[name])
    return run

def take(tensors, prefix, shapes):
    """Remove the matrices of a model from a dictionary of tensors, and return them by name."""
    rows = {name: tensors.pop(prefix + name) for name in shapes}
    found = {name: (len(rows[name]), len(rows[name][0])) for name in shapes}
    require(found == shapes, "its matrices are not those of its model")
    return rows

def load(path):
    """Return the Run in a checkpoint. Raise UserError if the file is missing, damaged, or of another kind."""
    with reporting(f"cannot read {path}"):
        tensors, metadata = read_safetensors(path)
        run = run_from(metadata)
        shapes = run.model.shapes()
        run.weights = take(tensors, "", shapes)
        run.m, run.v = zeros(run.weights), zeros(run.weights)
        if tensors:  # a file of weights alone has no running means
            run.m, run.v = take(tensors, "optimizer.m.", shapes), take(tensors, "optimizer.v.", shapes)
        run.saved = run.step
        return run

# 18. Looking inside ---------------------------------------------------------------------------------------
# What does a model make of a text? python microgpt.py --explain emma makes the default run, and then prints,
# among other lines:
#
#     token next      p   nats   bits the five likeliest (^ is BOS, _ a space)
#     m     a     0.231  1.463  2.111  a 0.231   i 0.218   e 0.091   o 0.061   u 0.054
#     a     ^     0.244  1.410  2.034  ^ 0.244   n 0.220   r 0.085   l 0.065   s 0.059
#
#            ^emma ^emma ^emma ^emma
#     m      ░░·▒  ░░░░  ░░░░  ▓·░·
#     a      ·░·░░ ░░░░░ ░░░░░ ·░·░░
#
# After "emm", the a that came had the probability 0.231, more than any other letter. So the loss there is
# -log(0.23149) = 1.463 nats, or 2.111 bits with log2. The model has learned that vowels often follow m, and
# after the a, its top guess is the end of the name. The maps show where the four heads looked: each row is a
# position, and a fuller cell means more attention. In the fourth head, the second m looks mostly at BOS, the
# first column.

def say(text): print(text, flush=True)  # at once, even to a file

def on_terminal(): return sys.stdout is sys.__stdout__ and sys.stdout.isatty()  # IDLE's window is not one

def visible(text):
    """Return a text with its control characters escaped, since they could garble a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)

def warn(message):
    if on_terminal():
        print()  # keeps the progress line
    print("microgpt: " + visible(message).replace("\n", "\\n"), file=sys.stderr, flush=True)

def width(text):
    """Return how many columns of a terminal a text takes: Chinese characters take two, accents none."""
    shown = [char for char in text if not unicodedata.combining(char)]
    return len(shown) + sum(unicodedata.east_asian_width(char) in "WF" for char in shown)

def pad(text, columns): return text + " " * (columns - width(text))

def shades():
    """Return five characters, from emptiest to fullest, that standard output can show."""
    with suppress(UnicodeEncodeError):
        "·░▒▓█".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        return "·░▒▓█"
    return ".:+%#"

def explain(run, ids):
    """Print the guesses, the losses, and the attention at each of some tokens."""
    names = [repr(token)[1:-1].replace(" ", "_") for token in run.tokenizer.tokens] + ["^"]
    rows = run.logits_of(ids[:-1])
    layers = [out.shares for out in tape if out.name == "attention"]  # per layer: the shares of its heads
    losses = [Tensor([row]).cross_entropy([target]).data for row, target in zip(rows, ids[1:])]
    tape.clear()
    wide, bit = max(5, *[width(names[i]) for i in ids]), math.log(2)
    title = "    p   nats   bits the five likeliest (^ is BOS, _ a space)"
    say(f"{pad('token', wide)} {pad('next', wide)} {title}")
    for token, target, p, loss in zip(ids, ids[1:], map(probabilities, rows), losses):
        best = nlargest(5, range(len(p)), key=lambda i: p[i])
        five = "  ".join(" " * (2 - width(names[i])) + f"{names[i]} {p[i]:.3f}" for i in best)
        pair = f"{pad(names[token], wide)} {pad(names[target], wide)}"
        say(f"{pair} {p[target]:.3f} {loss:6.3f} {loss / bit:6.3f} {five}")
    mean = sum(losses) / len(losses)
    say(f"{pad('mean', 2 * wide + 7)} {mean:6.3f} {mean / bit:6.3f}")
    show_maps(layers, [names[i] for i in ids[:-1]], wide + 1)

def show_maps(layers, names, wide):
    """Print where each head of each layer looked, for the last 30 positions at most."""
    last, dark = range(max(0, len(names) - 30), len(names)), shades()
    top = " " + "".join(names[t][0] if width(names[t][0]) == 1 else "?" for t in last)
    for layer, heads in enumerate(layers):
        scale = f"from {dark[0]} under 1/8 to {dark[-1]} over 7/8"
        say(f"\nlayer {layer}, each head: where a row looks, {scale}")
        say(" " * wide + top * len(heads))
        for t in last:
            maps = [[dark[round(head[t][i] * 4)] for i in last if i <= t] for head in heads]
            cells = " ".join("".join(row).ljust(len(last)) for row in maps)
            say(f"{pad(names[t], wide)} {cells}".rstrip())

STYLE = """<style>svg { color-scheme: light dark; background: Canvas; color: CanvasText }
text { fill: currentColor; font: 12px monospace } polyline { fill: none; stroke: currentColor }
.grid, .loss { stroke-opacity: 0.3 } .mean { color: #2f81f7 } .validation { color: #e0790b }</style>"""

def round_ticks(low, high):
    """Return at most eleven round numbers from low to high, 1, 2, or 5 times a power of ten apart. From 2.3
    to 3.4, these are 2.4, 2.6, 2.8, 3.0, 3.2, 3.4."""
    power = 10.0 ** math.floor(math.log10(high - low))
    gaps = power / 5, power / 2, power  # high - low is 1 to 10 powers
    gap = next(gap for gap in gaps if high - low <= 10 * gap)
    return [i * gap for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]

def loss_plot(losses, validations):
    """Return a picture of (step, loss) for --plot, in SVG: a text that lists shapes and points."""
    mean, means = 0.0, []
    for i, (step, loss) in enumerate(losses):  # a running mean over up to about 1/30 of the losses
        mean += (loss - mean) / min(i + 1, len(losses) // 30 + 1)
        means.append((step, mean))
    points = [*losses, *validations] or [(0, 0.0)]
    steps, values = zip(*points)
    first, last = min(steps), max(steps) + 1
    low, high = min(values), max(values) * 1.01 + 1e-3  # high exceeds low, even for one point

    def place(x, y):  # in pixels: x from 70 to 770, y from 450 up to 50
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

# A trace (--trace) helps you port this program to another language. Each line is JSON: the first describes
# the run and its weights (facts_of, section 17), and each of the others describes a step.

def begin_trace(path, run):
    """Write the first line of a trace. For a resumed run, keep only the lines up to its step."""
    kept, facts = [], {**facts_of(run), "bos": run.tokenizer.bos, "weights": run.weights}
    with reporting(f"cannot write {path}"):
        if run.step and os.path.exists(path):
            with open(path, "rb") as file:
                lines = [line for line in file if line.endswith(b"\n")]  # the last one may be cut off
            first = json.loads(lines[0]) if lines else facts
            same = [first.get(name) == facts[name] for name in ("characters", "config")]
            require(all(same), "it is the trace of another run")
            kept = list(takewhile(lambda line: json.loads(line)["step"] <= run.step, lines))
        replace_file(path, kept or [json.dumps(facts).encode() + b"\n"])

def write_trace(path, run, batch, loss, grads):
    """Write a line about the step to be made. The line of step 1 also has all gradients and operations."""
    facts = {"step": run.step + 1, "documents": [run.tokenizer.decode(ids) for ids in batch], "tokens": batch,
             "loss": loss, "learning_rate": learning_rate(run.args, run.step)}
    size = norm(grads)
    facts["gradient_norm"] = size if math.isfinite(size) else None  # JSON has no infinity
    if run.step == 0:
        mean_loss(run.model, run.wrap(FastTensor), batch)
        facts["gradients"] = grads
        facts["operations"] = [[out.name, out.data] for out in tape]
        tape.clear()
    with reporting(f"cannot write {path}"), open(path, "ab") as file:
        file.write(json.dumps(facts).encode() + b"\n")

# 19. Training ---------------------------------------------------------------------------------------------
# Training takes documents from a corpus, makes steps, and shows its progress. To see whether the model learns
# more than its documents, we hold some out and never train on them. The mean loss on up to 128 of them is the
# validation loss. With --val-fraction 0.1, these functions process input.txt:
#
#     find_files     returns its full path, so that the run can go on from any folder
#     load_corpus    returns its 9,347 names, shuffled
#     split          returns 8,412 of them to train on, and 935 to hold out
#     new_run        makes a tokenizer for a to z, and a Run with random weights
#     tokenize       turns emma into [26, 4, 12, 12, 0, 26]; of the 935, it keeps every eighth, 117 in all

def find_files(patterns):
    """Return the full paths of the files that match some paths or patterns, each file once, sorted."""
    files = {}
    for pattern in patterns:
        found = [pattern]
        if not os.path.exists(pattern):
            found = list(filter(os.path.isfile, glob(pattern, recursive=True)))
        require(found, f"cannot read {pattern}: No such file or directory; name the text with --corpus")
        for path in found:
            files[os.path.realpath(path)] = os.path.abspath(path)  # a link and its file are one
    return sorted(files.values())

def read_text(path):
    """Return the text of a UTF-8 file. Add a final newline if there is none."""
    with reporting(f"cannot read {path}"), open(path, encoding="utf-8-sig") as file:
        text = file.read().replace("\ufeff", "")  # joined files have byte-order marks inside
        require("\0" not in text, "it has NUL characters (is it UTF-16?)")
    return text if text.endswith("\n") else text + "\n"

def load_corpus(args, rng):
    """Return the documents of a corpus, shuffled, and facts about it. A stream is one document."""
    text = "".join(map(read_text, args.corpus))
    docs = [text]
    if not args.stream:
        docs = [line.strip() for line in text.split("\n") if line.strip()]
    facts = corpus_facts(docs, args.corpus)
    rng.shuffle(docs)
    return docs, facts

def corpus_facts(docs, paths):
    """Return what a Run keeps of its corpus, so that it knows the corpus again."""
    digest = hashlib.sha256("\n".join(docs).encode()).hexdigest()
    return {"paths": paths, "documents": len(docs), "sha256": digest}

def split(docs, args):
    """Return the documents (or the one text of a stream) to train on, and those to hold out: the last ones,
    except those that also occur in the first part."""
    whole = docs[0] if args.stream else docs
    cut = len(whole)
    if args.val_fraction:
        cut -= max(1, round(len(whole) * args.val_fraction))
    require(cut > 0, f"there is too little text in {', '.join(args.corpus or ['docs'])}")
    if args.stream:
        return [whole[:cut]], [whole[cut:]]
    trained = set(docs[:cut])
    held_out = [doc for doc in docs[cut:] if doc not in trained]
    require(held_out or not args.val_fraction, "all documents to hold out also occur among the others")
    return docs[:cut], held_out

def new_run(args, docs, held_out, rng):
    """Return a new Run. Learn its merges from the documents to train on."""
    tokenizer = BPETokenizer(docs + held_out)
    if args.merges:
        merges = learn_merges(tokenizer.merge(docs), args.merges, len(tokenizer.tokens))
        tokenizer = BPETokenizer(tokenizer.tokens, merges)  # for its alphabet, single characters will do
    return Run(args, tokenizer, rng)

def tokenize(run, docs, held_out):
    """Return lists of ids: documents to train on, and at most 128, cut at the context, to validate on. Leave
    out documents that have only unknown characters."""
    edge, size = run.boundary, run.model.block_size
    # merge returns strings of chr(id), as section 11 uses them.
    def convert(texts): return [[*edge, *map(ord, doc), *edge] for doc in run.tokenizer.merge(texts) if doc]
    docs, held_out = convert(docs), convert(held_out)
    if run.args.stream:
        held_out = [text[i : i + size + 1] for text in held_out for i in range(0, len(text) - 1, size)]
    check_lengths(run.args, docs, held_out)  # section 20
    every = max(1, math.ceil(len(held_out) / 128))
    return docs, [doc[: size + 1] for doc in held_out[::every]]

# A step takes the next documents, computes the loss and the gradients, and lets the optimizer move the
# weights. With --batch-size 4, step 1 takes documents 0 to 3, step 2 takes 4 to 7, and so on, over and over.
# A stream has no documents, so each step takes pieces from random places.

def next_batch(run, docs, size):
    """Return the next documents, cut after block_size + 1 ids, or pieces of that length from a stream."""
    length = run.model.block_size + 1  # the last token is only a target
    if run.args.stream:
        rng = random.Random(f"{run.args.seed} {run.step}")  # a resumed run draws the same pieces
        starts = [rng.randrange(len(docs[0]) - length + 1) for _ in range(size)]
        return [docs[0][start : start + length] for start in starts]
    first = run.step * size
    return [docs[i % len(docs)][:length] for i in range(first, first + size)]

def update(run, grads):
    args = run.args
    settings = {name: getattr(args, name) for name in SETTINGS[args.optimizer]}
    lr = learning_rate(args, run.step)
    if args.clip_grad:
        grads = clip(grads, args.clip_grad)
    OPTIMIZERS[args.optimizer](run.weights, grads, run.m, run.v, run.step, lr, **settings)

def train(run, docs, held_out, workers, signals):
    """Make the steps that are left, or stop at a signal (signals.caught, section 20). Save if asked to."""
    args, first, begin = run.args, run.step, time.perf_counter()
    while run.step < args.steps and not signals.caught:
        batch = next_batch(run, docs, args.batch_size)
        loss, grads = workers.loss_and_grads(run.model, run.weights, batch)
        show_progress(run, loss, first, begin)
        check_finite([loss], f"at step {run.step + 1}, ")
        if args.trace:
            write_trace(args.trace, run, batch, loss, grads)
        update(run, grads)
        run.step += 1
        after_step(run, held_out, loss)
    if args.save:
        run.save()

def sample_of(run, rng):
    """Return a sample, made as the flags ask and safe to print."""
    args = run.args
    return visible(run.generate(args.prompt, args.temperature, args.top_k, args.max_tokens, rng))

def after_step(run, held_out, loss):
    """Record the loss, and do what is due: validate, show a sample, save (every ten minutes at least)."""
    args, step = run.args, run.step
    if step % (1 + args.steps // 4000) == 0:  # a few thousand points are enough
        run.losses.append((step, loss))
    if held_out:
        run.recent.append(loss)
        if step % args.eval_every == 0 or step == args.steps:
            validate(run, held_out)
    if args.gen_every and step % args.gen_every == 0:
        say(f"\nsample at step {step}: {sample_of(run, random.Random(step))}")
    due = step % args.save_every == 0 or time.perf_counter() > run.saved_at + 600
    if args.save and due and step < args.steps:
        try:
            run.save()
        except UserError as error:  # the disk is full, for example; the next try may succeed
            warn(f"warning: {error}")

def validate(run, held_out):
    """Print the mean training and validation losses. Record the validation loss."""
    w = run.wrap()
    total, training = 0.0, None
    for ids in held_out:  # one at a time, to save memory
        total += mean_loss(run.model, w, [ids]).data * (len(ids) - 1)
        tape.clear()
    validation = total / predictions(held_out)
    check_finite([validation])
    run.validations.append((run.step, validation))
    text = f"step {run.step:4d} / {run.args.steps:4d}"
    if run.recent:
        training = sum(run.recent) / len(run.recent)
        text += f" | loss {training:.4f} on average"
    text += f" | validation {validation:.4f}"
    if run.tokenizer.merges:  # for comparison with tokens of other lengths; BOS counts as a character
        characters = sum(len(run.tokenizer.decode([i])) or 1 for ids in held_out for i in ids[1:])
        text += f" | {total / characters:.4f} per character"
    say(text.ljust(columns()) if on_terminal() else text)  # overwrites the progress line
    run.recent.clear()
    if training:
        compare_losses(run, training, validation)

def compare_losses(run, training, validation):
    """Warn or stop if the validation loss is far above the training loss: the model has begun to memorize."""
    args, above = run.args, (validation / training - 1) * 100
    message = f"at step {run.step} the validation loss is {above:.0f}% above the training loss"
    require(args.div_crit is None or above <= args.div_crit, message)
    if above > args.div_warn:
        warn(f"warning: {message}")

# On a terminal, one line shows the progress. It changes in place, since it ends in \r, and is cut to fit. A
# file or a pipe gets only the step and the loss.
#
#     step 1000 / 2000 | loss 2.4885 | 311 steps/s, 0:00:03 of 0:00:06 left

def columns(): return (shutil.get_terminal_size().columns or 80) - 1

def duration(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))

def show_progress(run, loss, first, begin):
    """Print the loss of a step and, on a terminal, how fast the run is and when it will end."""
    step, steps = run.step + 1, run.args.steps
    text = f"step {step:4d} / {steps:4d} | loss {loss:.4f}"
    if on_terminal():
        seconds = (time.perf_counter() - begin) / (step - first)
        left, whole = duration(seconds * (steps - step)), duration(seconds * (steps - first))
        text = f"{text} | {1 / seconds:.3g} steps/s, {left} of {whole} left"[: columns()].ljust(columns())
    print(text, end="\n" if "idlelib" in sys.modules else "\r", flush=True)  # IDLE has no \r

# --autotune times settings, three steps each after one to warm up. It saves nothing. A larger batch gives a
# worker or a GPU more to do at a time.

def time_steps(run, docs, engine, size, n):
    """Return the seconds that a step takes with n workers, a mean of three, and its number of predictions."""
    workers, batch = Workers(n, ENGINES[engine]), next_batch(run, docs, size)
    def step(): update(run, workers.loss_and_grads(run.model, run.weights, batch)[1])
    try:
        step()
        begin = time.perf_counter()
        for _ in range(3):
            step()
        return (time.perf_counter() - begin) / 3, predictions(batch)
    finally:
        workers.stop()

def autotune(run, docs, given):
    """Time steps with each engine, batch size, and number of workers, and print the fastest as a command."""
    args, rates = run.args, {}
    require(run.step < args.steps, "--autotune needs a run with steps left to make", UsageError)
    engines = ["tensor", "vulkan"] if args.engine == "vulkan" else [args.engine]
    say("batch size  workers  engine  tokens/s  all steps")
    for engine, size, n in product(engines, args.batch_sizes, args.worker_counts):
        row = f"{size:10}  {n:7}  {engine:6}"
        if n > size:
            continue
        try:
            seconds, tokens = time_steps(run, docs, engine, size, n)
        except (RuntimeError, ArithmeticError, MemoryError) as error:
            say(f"{row}  {reason(error)}")
        else:
            say(f"{row}  {tokens / seconds:8.0f}  {duration(seconds * args.steps)}")
            rates[size, n, engine] = tokens / seconds
    require(rates, "none of these settings works")
    best = dict(zip(("batch_size", "workers", "engine"), max(rates, key=rates.get)))
    flags = {name: value for name, value in {**given, **best}.items() if name not in TUNED}
    # shlex.join adds quotes where a shell needs them.
    say(shlex.join([os.path.basename(sys.executable), sys.argv[0], *as_argv(flags)]))

# 20. The command line -------------------------------------------------------------------------------------
# Nothing below is about learning: you can stop here. This section leads from a command to the functions
# above, and follows two commands, today's and tomorrow's:
#
#     python microgpt.py --steps 50 --save run.safetensors
#     python microgpt.py --resume run.safetensors --steps 100
#
# Python gives us the words after the file's name as a list, argv: ["--steps", "50", "--save",
# "run.safetensors"]. Four functions do what the words ask for. execute calls them in this order:
#
#     function          what comes of it      today                       tomorrow
#     parse_args        args, the settings    50 steps, else defaults     100 steps, else as saved today
#                       a Run to resume       none                        the saved one, at step 50
#     prepare           the Run to train      with random weights         the saved one
#                       documents             9,347 names                 the same names
#     train_and_keep    steps, and a file     steps 1 to 50               steps 51 to 100
#     show              samples               kn, kaoa, kela, ...         qssli, benil, qelli, ...

def execute(argv, signals):
    """Do what a command line asks for, and return the exit status, 0 for success. (Class Signals: below.)"""
    run = None
    try:
        args, run, given = parse_args(argv)
        run, docs, held_out = prepare(args, run, given)
        check_texts(run, args)
        if args.autotune:
            autotune(run, docs, given)
            return 0
        if held_out and run.step >= args.steps:
            validate(run, held_out)  # otherwise, train validates after the last step
        train_and_keep(run, docs, held_out, signals)
        show(run)
        return 0
    except (RuntimeError, ArithmeticError, ValueError, MemoryError, OSError, KeyboardInterrupt) as error:
        return report(error, run, signals.caught)

# In parse_args, Python's argparse reads the words for us. At a wrong word, argparse would end the whole
# process, which may be a notebook. So our Parser raises a UsageError instead, and report prints its message.

class UsageError(UserError): status = 2  # the exit status (report, below)

def refuse(condition, message):
    """Raise UsageError with the message if the condition holds."""
    require(not condition, message, UsageError)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        if "expected one" in message:  # for --prompt -x, argparse takes -x for a flag
            message += " (if it begins with -, write --flag=VALUE)"
        raise UsageError(message + "; see --help")

    def print_help(self, file=None):  # flush: if the disk is full, raise the error here
        print(self.format_help(), end="", flush=True)

# Each flag has a type, a function that turns a text into a value or refuses it. The type number(int, 1)
# turns "50" into 50, and refuses "0" and "many". In --help, a metavar, such as N, stands for the value.

def number(kind, low, high=math.inf):
    """Return a function that turns a text into a number, low <= number < high, or refuses it."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) < high:
                return kind(text)
        wanted = "a whole number" if kind is int else "a number"
        below = f" and below {high:g}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}, at least {low}{below}")
    return parse

N = {"metavar": "N", "type": number(int, 0, 10**12)}     # 0, 1, 2, ...
COUNT = {"metavar": "N", "type": number(int, 1, 10**9)}  # 1, 2, 3, ...
COUNTS = {"metavar": "N,N", "type": lambda text: [COUNT["type"](word) for word in text.split(",")]}  # 1,2,4
X = {"metavar": "X", "type": number(float, 0)}            # 0 or more
SHARE = {"metavar": "X", "type": number(float, 0, 1)}     # from 0 to below 1
TEXT = {"metavar": "TEXT", "type": lambda text: text.replace("\\n", "\n")}  # \n becomes a newline
CORES = [2**i for i in range((os.cpu_count() or 1).bit_length())]  # 1, 2, 4, ... up to the cores

# Here are all the flags, with their help texts. FLAGS.parse_args(["--steps", "50"]) returns an object with
# steps = 50, lr = 0.01, and so on: each flag's first name, with _ for -, and its value or its default.

FLAGS = Parser(prog="microgpt", usage="%(prog)s [flags]", allow_abbrev=False)

flag = FLAGS.add_argument_group("basics").add_argument  # from here on, flag(...) adds one to the group
flag("--corpus", metavar="GLOB", action="append", help="text, a document per line; repeatable (input.txt)")
flag("--stream", action="store_true", help="the corpus is one continuous text, not lines")
flag("--n-layer", "--layers", **COUNT, default=1, help="number of layers (1)")
flag("--n-embd", "--d-model", **COUNT, default=16, help="channels per position (16)")
flag("--block-size", "--context", **COUNT, default=16, help="most tokens that the model can see (16)")
flag("--steps", **N, default=1000, help="total training steps (1000)")
flag("--batch-size", **COUNT, default=1, help="documents per step (1)")
flag("--save", metavar="FILE", help="save the run in this new file, for --resume")
flag("--resume", metavar="FILE", help="continue this run; other flags override its settings")
flag("--prompt", **TEXT, default="", help=r"what every sample begins with; \n is a newline")
flag("--merges", "--vocab-size", **N, default=0, help="byte-pair merges to learn (0)")
flag = FLAGS.add_argument_group("model").add_argument
flag("--n-head", "--heads", **COUNT, default=4, help="attention heads per layer (4)")
flag("--arch", choices=MODELS, default="microgpt", help="gpt2: with LayerNorm, biases, GELU (microgpt)")
flag = FLAGS.add_argument_group("training").add_argument
flag("--optimizer", choices=OPTIMIZERS, default="adam", help="what moves the weights (adam)")
flag("--lr", **X, default=0.01, help="the learning rate at its highest (0.01)")
flag("--beta1", **SHARE, default=0.85, help="how much of the mean of gradients to keep (0.85)")
flag("--beta2", **SHARE, default=0.99, help="how much of the mean of their squares to keep (0.99)")
flag("--eps", metavar="X", type=number(float, 1e-30), default=1e-8, help="prevents division by 0 (1e-08)")
flag("--weight-decay", **X, default=0.01, help="adamw: how hard to pull weights toward 0 (0.01)")
flag("--schedule", choices=SCHEDULES, default="linear", help="the learning rate after the warmup (linear)")
flag("--cosine", dest="schedule", action="store_const", const="cosine", help="short for --schedule cosine")
flag("--warmup-steps", **N, default=0, help="first steps, in which the learning rate rises (0)")
flag("--clip-grad", **X, default=0.0, help="largest norm of all gradients together; 0: no limit (0)")
flag("--no-clip-grad", dest="clip_grad", action="store_const", const=0.0, help="short for --clip-grad 0")
flag("--seed", **N, default=42, help="seed of the random generator (42)")
flag = FLAGS.add_argument_group("watching").add_argument
flag("--val-fraction", **SHARE, default=0.0, help="share of the corpus to hold out for validation (0)")
flag("--eval-every", **COUNT, default=100, help="validate every N steps (100)")
flag("--div-warn", **X, default=20.0, help="warn if validation is more than X%% above training (20)")
flag("--div-crit", **X, help="stop if validation is more than X%% above training")
flag("--gen-every", **COUNT, help="show a sample every N steps")
flag("--plot", metavar="FILE.svg", help="draw the loss")
flag("--trace", metavar="FILE.jsonl", help="write a line of numbers for every step")
flag("--explain", **TEXT, help="show what the model makes of this text")
flag = FLAGS.add_argument_group("keeping").add_argument
flag("--save-every", **COUNT, default=500, help="also save every N steps, and every 10 minutes (500)")
flag = FLAGS.add_argument_group("sampling").add_argument
flag("--samples", **N, default=20, help="how many samples (20)")
flag("--temperature", **X, default=0.5, help="1: the model's odds, 0: always the likeliest (0.5)")
flag("--top-k", **N, default=0, help="draw from the N likeliest tokens, 0: from all (0)")
flag("--max-tokens", **COUNT, help="new tokens per sample, at most (the context)")
flag = FLAGS.add_argument_group("engine").add_argument
flag("--engine", choices=ENGINES, default="tensor", help="scalar: that of part one; vulkan: GPU (tensor)")
flag("--vulkan", dest="engine", action="store_const", const="vulkan", help="short for --engine vulkan")
flag("--workers", metavar="N", type=number(int, 1, 257), default=1, help="processes to share each batch (1)")
flag("--autotune", action="store_true", help="find the fastest settings, and print them as a command")
flag("--batch-sizes", **COUNTS, default=[1, 2, 4, 8, 16], help="sizes to try (1,2,4,8,16)")
flag("--worker-counts", **COUNTS, default=CORES, help="numbers of workers to try (1,2,4 ... up to the cores)")

# Each setting has a default. A resumed run overrides it, and a flag on the command line overrides both:
#
#                default    saved today    given tomorrow     args
#     steps      1000       50             100                100
#     lr         0.01       0.01                              0.01
#     resume                               run.safetensors    run.safetensors
#     save                                                    run.safetensors, as nothing else is given

DEFAULTS = vars(FLAGS.parse_args([]))

def given_flags(argv):
    """Return name -> value of the flags on a command line, without defaults."""
    # argparse gives a default only to a name that the object lacks, and None counts as a value.
    flags = argparse.Namespace(**dict.fromkeys(DEFAULTS))
    FLAGS.parse_args(argv, flags)
    return {name: value for name, value in vars(flags).items() if value is not None}

def parse_args(argv):
    """Return the settings, the Run to resume (None: a new one), and the flags on the command line."""
    given = given_flags(argv)
    run = load(given["resume"]) if "resume" in given else None
    saved = vars(run.args) if run else {}
    args = argparse.Namespace(**{**DEFAULTS, **saved, **given})
    if needs_corpus(args, run, given):
        args.corpus = find_files(args.corpus or [default_corpus()])
    if "div_warn" in given or "div_crit" in given:  # both need validation
        refuse(run and not args.val_fraction, "the run to resume has no --val-fraction")
        args.val_fraction = args.val_fraction or 0.1
    if run and run.step < args.steps and args.save is None:
        args.save = args.resume
    check(args)
    return args, run, given

def needs_corpus(args, run, given):
    """Return whether documents must be read. A run that has made all its steps only shows samples."""
    return run is None or run.step < args.steps or "corpus" in given or "val_fraction" in given

def default_corpus():
    """Return the path of input.txt, here or beside this file. (A notebook's cell has no __file__.)"""
    folder = os.path.dirname(globals().get("__file__", ""))
    return "input.txt" if os.path.exists("input.txt") else os.path.join(folder, "input.txt")

# A run can be resumed for three things. Its matrices always keep their sizes.
#
#     more samples                      --seed may change
#     more steps on the same corpus     --seed and --val-fraction stay, to hold out the same documents
#     steps on another (fine-tuning)    both may change, but --save must name a new file
#
# Tomorrow's command is the second kind: more_steps is true, fine_tuning and new_split are false, and nothing
# is refused.

FIXED = "n_layer", "n_embd", "n_head", "block_size", "arch", "merges", "stream"

def resume(run, args, given, corpus):
    """Let a run go on with new settings. Refuse those that would make it another run."""
    old, run.args, path = run.args, args, args.resume
    more_steps = run.step < args.steps
    fine_tuning = args.corpus != old.corpus and is_another(run.corpus, corpus)
    if run.corpus is None and "corpus" not in given:  # an earlier version saved it
        fine_tuning = False
    new_split = args.seed != old.seed or args.val_fraction != old.val_fraction
    changed = [name.replace("_", "-") for name in FIXED if getattr(args, name) != getattr(old, name)]
    refuse(changed, f"{path} was made with another --{' --'.join(changed)}")
    if fine_tuning:
        refuse(not more_steps, f"{path} has made its {run.step} steps; --steps must be larger")
        refuse(same_file(args.save, path), "a new --corpus needs a new --save, too")
    elif corpus:  # more steps on the same one
        refuse(new_split, "another --seed or --val-fraction would change what is held out")
    if args.seed != old.seed:
        run.rng.seed(args.seed)
    if args.optimizer != old.optimizer:
        warn(f"note: {args.optimizer} starts over, without the running means of {old.optimizer}")
        run.m, run.v = zeros(run.weights), zeros(run.weights)

def is_another(old, corpus):
    """Return whether a corpus has a different text, not just a different path."""
    return old is None or old.get("sha256") != corpus["sha256"]

def same_file(a, b):
    """Return whether two paths (or None) name the same file."""
    return bool(a and b) and os.path.realpath(a) == os.path.realpath(b)

def prepare(args, run, given):
    """Return the Run, a new one if it is None, and what tokenize returns (empty lists without a corpus)."""
    docs, held_out, corpus, rng = [], [], None, random.Random(args.seed)
    if needs_corpus(args, run, given):
        docs, corpus = load_corpus(args, rng)
    if run:
        resume(run, args, given, corpus)
    if corpus:
        docs, held_out = split(docs, args)
        say(f"num docs: {len(docs)}")
        if run:
            compare_corpus(run, corpus, docs + held_out)
        else:
            run = new_run(args, docs, held_out, rng)
        run.corpus = corpus
        docs, held_out = tokenize(run, docs, held_out)
        if run.tokenizer.merges:
            characters = sum(len(run.tokenizer.decode(doc)) for doc in docs)
            tokens = sum(len(doc) - 2 * len(run.boundary) for doc in docs)
            say(f"characters per token: {characters / tokens:.2f}")
    say(f"vocab size: {run.tokenizer.vocab_size}")
    say(f"num params: {sum(len(row) for (row,) in rows_of(run.weights))}")
    return run, docs, held_out

# Training may take hours, and may end early: a worker dies, memory runs out, or you press Ctrl-C, which sets
# signals.caught. Then the finished steps are saved. (Not after an Overflow: the last checkpoint is better.)

def train_and_keep(run, docs, held_out, signals):
    """Train and save. Draw the plot, however training ends."""
    args, first = run.args, run.step
    if args.trace:
        begin_trace(args.trace, run)
    signals.training = True  # from now on, Ctrl-C lets the step end (class Signals, below)
    workers = Workers(args.workers if first < args.steps else 1, ENGINES[args.engine])
    try:
        train(run, docs, held_out, workers, signals)
    except (RuntimeError, OSError, MemoryError):
        if args.save and run.step > first:
            run.save()
        if not signals.caught:  # a signal can kill a worker, too
            raise
    finally:
        workers.stop()
        if args.plot:
            replace_file(args.plot, [loss_plot(run.losses, run.validations).encode()])
    signals.training = False
    if signals.caught:
        raise KeyboardInterrupt

def show(run):
    args = run.args
    title = f"--- inference (new, hallucinated {'text' if args.stream else 'names'}) ---"
    say(f"\n{title}" if args.samples else "")
    for i in range(args.samples):
        say(f"sample {i + 1:2d}: {sample_of(run, run.rng)}")
    if args.explain is not None:
        ids = run.encode(args.explain) + run.boundary
        if len(ids) > args.block_size + 1:
            warn(f"note: --explain shows only as much of the text as --context {args.block_size} holds")
        explain(run, ids[: args.block_size + 1])

# In a notebook, learn(["emma", "anna"], steps=500) trains on a list of strings.

def learn(docs, **settings):
    """Return a Run, trained on a list of strings. The settings are flags, and are checked in the same way."""
    require(not isinstance(docs, str), "learn needs a list of strings, not a string")
    require(not {"corpus", "resume"} & set(settings), "learn takes no corpus and no run to resume")
    if "div_warn" in settings or "div_crit" in settings:  # as in parse_args
        settings.setdefault("val_fraction", 0.1)
    args = FLAGS.parse_args(as_argv(settings))
    check(args)
    docs = ["\n".join(docs)] if args.stream else list(docs)
    corpus = corpus_facts(docs, ["a list of strings"])
    docs, held_out = split(docs, args)
    run, signals = new_run(args, docs, held_out, random.Random(args.seed)), Signals()
    run.corpus = corpus
    check_texts(run, args)
    try:
        signals.start()
        train_and_keep(run, *tokenize(run, docs, held_out), signals)
    finally:
        signals.end(ignore=False)
    say("")  # ends the line of the last loss
    return run

# So far, nothing went wrong. The rest, except main at the end, is for errors: skip it until you meet one.
#
#     what happens                   what you read, after "microgpt: "                          raised by
#     you type --heads 3             error: --heads 3 does not divide --d-model 16              check
#     you repeat today's command     error: run.safetensors holds a run of 50 steps: ...        check_files
#     tomorrow, the prompt is é      error: the model was trained without 'é' (U+00E9); ...     check_texts
#     a worker dies in step 37       error: a worker has died; step 36 is saved                 Workers
#     you press Ctrl-C in step 37    interrupted; step 37 is saved                              train_and_keep
#     the disk is full               error: cannot save run.safetensors: No space left ...      replace_file
#
# Each of these is an exception that ends in report. It prints the line and returns the exit status, a number
# for other programs: 0 means success, 2 flags that are refused, 1 any other error, and 128 + n signal n.
# Ctrl-C is signal 2, so the status is 130.
#
# File errors have become UserErrors by then (by reporting, section 12). So an OSError is about standard
# output, to which print writes: the terminal, a file, or a pipe to another program. In python microgpt.py |
# head -1, head shows one line and ends. Now nobody holds the other end of our pipe, so a later print raises
# BrokenPipeError. Nothing is wrong, and report prints nothing. But print gathers text in memory, and on exit,
# Python writes what is still there, which would fail again. So report sends it to os.devnull, a file that
# swallows everything: the system knows open files by numbers (1 is standard output, 2 standard error), and
# os.dup2(a, b) makes number b stand for the file of number a.

def report(error, run, caught):
    """Say in one line why a command ended early, and what is saved. Return the exit status."""
    message, status = f"error: {reason(error)}", getattr(error, "status", 1)
    if isinstance(error, KeyboardInterrupt):
        message, status = "interrupted", 128 + (caught or 2)
    elif isinstance(error, OSError):
        message = f"error: cannot write the output: {reason(error)}"
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status
    if run and status != 2:
        message += "; nothing was saved" if run.saved is None else f"; step {run.saved} is saved"
    warn(message)
    return status

def check(args):
    """Before training, refuse flags that do not go together, and files that cannot be written."""
    heads, d, workers, size = args.n_head, args.n_embd, args.workers, args.batch_size
    refuse(d % heads, f"--heads {heads} does not divide --d-model {d}")
    refuse(workers > size, f"--workers {workers} is more than --batch-size {size}")
    weights = args.n_layer * 12 * d * d + args.block_size * d  # a layer: 4 d x d in attention, 8 in the MLP
    refuse(weights > 10**9, "the model is too large")
    check_files(args)

# No command may destroy an unrelated file. A picture (--plot) replaces only an empty file or a picture, and a
# trace an empty file or a trace. A checkpoint replaces only its own earlier version.

def check_files(args):
    """Refuse to use one file twice, and to replace what must be kept."""
    own = same_file(args.save, args.resume)  # then the run replaces its own checkpoint
    files = [args.plot, args.trace, *(args.corpus or []), args.save, None if own else args.resume]
    places = [os.path.realpath(path) for path in files if path]
    refuse(len(set(places)) < len(places), "a file is named for two purposes")
    if is_taken("save", args.save) and not own:
        with reporting(f"cannot write {args.save}"), open(args.save, "rb") as file:
            metadata, _ = read_header(file)
            require("step" in metadata, "it was not saved by this program")
        raise UsageError(f"{args.save} holds a run of {metadata['step']} steps: "
                         f"go on with --resume {args.save}, or save under another name")
    for name, end, start in ("plot", ".svg", b"<svg"), ("trace", ".jsonl", b'{"flags"'):
        path = getattr(args, name)
        if is_taken(name, path, end):
            with reporting(f"cannot write {path}"), open(path, "rb") as file:
                begin = file.read(len(start))
            refuse(begin not in (b"", start), f"--{name} would replace {path}, which holds something else")

def is_taken(name, path, end=""):
    """Refuse a path where no file can be written. Otherwise, return whether a file is there already."""
    if path is None:
        return False
    target = os.path.realpath(path)
    good = os.path.basename(path) and path.endswith(end) and os.access(os.path.dirname(target), os.W_OK)
    wanted = f"a file *{end}" if end else "a file"
    refuse(not good, f"--{name} needs {wanted} in a writable folder, not {path!r}")
    with reporting(f"cannot write {path}"):
        try:
            os.stat(target)  # unlike os.path.exists, it refuses a name that is too long
        except FileNotFoundError:
            return False
        require(os.path.isfile(target), "it is not a file")
    return True

def compare_corpus(run, corpus, docs):
    """Print a note if these documents contain something new to the run."""
    notes, old = [], run.corpus or {"paths": ["an unknown text"], "documents": "?"}
    if is_another(run.corpus, corpus):
        then, now = [f"{', '.join(text['paths'])} ({text['documents']} documents)" for text in (old, corpus)]
        notes.append(f"it was trained on {then}, and goes on with {now}")
    unknown = [char for doc in docs for char in doc if char not in run.tokenizer.ids]
    if unknown:
        chars = ", ".join(map(repr, sorted(set(unknown))))
        notes.append(f"the model was trained without {chars}, so {len(unknown)} characters are left out")
    if notes:
        warn("note: " + "; ".join(notes))

def check_lengths(args, docs, held_out):
    """Refuse an empty corpus, or a stream too short for the context. Say if documents will be cut."""
    require(docs, "the model knows none of these characters")
    size, longest = args.block_size, max(map(len, docs)) - 1  # without the last token, only a target
    if args.stream:
        enough = longest >= size and (held_out or not args.val_fraction)
        require(enough, f"a stream of {longest + 1} tokens is too short for a context of {size}")
    elif longest > size:
        long = sum(len(doc) > size + 1 for doc in docs)
        hint = "--stream reads all" if len(docs) == 1 else f"--context {longest} would hold all"
        warn(f"note: {long} of {len(docs)} documents exceed --context {size} and are cut there; {hint}")

def check_texts(run, args):
    """Refuse a --prompt or --explain that the model cannot read."""
    run.encode(args.prompt)  # raises the error of section 11
    if args.explain is not None:
        ids = run.encode(args.explain) + run.boundary
        refuse(len(ids) < 2, "--explain needs at least two tokens")

# A signal is a number that the system sends to a process: SIGINT (2) when you press Ctrl-C, SIGTERM from the
# command kill, SIGHUP when the terminal closes. Python then calls a function, the signal's handler, wherever
# the program is, and goes on afterward, unless it raises. (The handler SIG_IGN ignores the signal.) In the
# middle of a step, some weights have moved, and others have not. So in training, our handler, catch, only
# records the signal:
#
#     in step 37       catch sets caught = 2
#     after step 37    train sees it, and saves the run
#     then             train_and_keep raises KeyboardInterrupt, as Ctrl-C usually does at once
#
# Outside training, or at a second Ctrl-C, catch raises KeyboardInterrupt at once.

class Signals:
    """The signals that ask the program to stop. From start() to end(), each of them calls catch()."""
    def __init__(self):
        self.caught, self.training, self.before = 0, False, {}

    def catch(self, number, frame):
        if self.caught and number not in (signal.SIGINT, signal.SIGTERM):
            return  # a terminal that closes may send SIGHUP twice
        at_once = self.caught or not self.training
        self.caught = number
        if at_once:
            raise KeyboardInterrupt
        if on_terminal():  # os.write to 2, standard error, as a print may be going on
            os.write(2, b"\nmicrogpt: finishing this step; interrupt again to stop without saving\n")

    def start(self):
        with suppress(ValueError):  # Python allows this only in the main thread
            for number in STOPS:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):  # nohup, for example, sets SIG_IGN
                    self.before[number] = signal.signal(number, self.catch)

    def end(self, ignore):
        """Restore the earlier handlers, or ignore all further signals."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)

# The program begins in main. CPython searches for unused objects that refer to each other in a circle.
# Training makes none, so main turns the search off. (PyPy has no other way to free memory.)

def main(argv=(), ends=False):
    """Run a command line, and return its exit status. Leave the process (such as a notebook) as it was,
    unless it ends now (ends)."""
    collects, signals, status = gc.isenabled(), Signals(), 1
    if not PYPY:
        gc.disable()
    try:
        signals.start()
        status = execute(argv, signals)
        return status
    finally:
        signals.end(ignore=ends and status)
        tape.clear()
        if collects:
            gc.enable()

if __name__ == "__main__":
    for name in "stdout", "stderr":
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: closed from the start
        setattr(sys, name, stream)
        if stream is getattr(sys, f"__{name}__"):  # not so in IDLE and in notebooks
            stream.reconfigure(errors="backslashreplace")  # the terminal may be unable to show a character
    # Does anything run after main? Code that was called has a caller, f_back: in a notebook, the notebook.
    # After python microgpt.py, there is none, and the process ends (unless python -i waits for input). Then,
    # after an error, main leaves signals ignored, so that a late Ctrl-C cannot print a traceback under our
    # message.
    alone = sys._getframe().f_back is None and not sys.flags.interactive
    exit_status = main(sys.argv[1:] if "__file__" in globals() else (), ends=alone)  # a cell has no __file__
    if exit_status:
        sys.exit(exit_status)
