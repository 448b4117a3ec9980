"""What each task asks for, found from the tokens alone in plain Python.

A solver takes a task and the tokens of one sequence and returns the answers by their positions:
exactly those that count. It shares nothing with the generators.
"""

from itertools import pairwise, permutations


def keep_nth(task, tokens):
    return {len(tokens) - 1: tokens[task.nth - 1]}


def parity(task, tokens):
    return {t: tokens[: t + 1].count(1) % 2 for t in range(len(tokens))}


def mqar(task, tokens):
    answers = {}
    for t in range(2 * task.pairs, len(tokens)):
        if tokens[t] < task.values // 2:
            first = tokens.index(tokens[t])
            assert first % 2 == 0
            assert first < 2 * task.pairs
            answers[t] = tokens[first + 1]
    assert answers
    return answers


def k_hop(task, tokens):
    def hop(t):
        for earlier in range(t - 1, -1, -1):
            if tokens[earlier] == tokens[t]:
                return earlier + 1
        return None

    answers = {}
    for t in range(len(tokens)):
        place = t
        for _ in range(task.hops):
            place = hop(place) if place is not None else None
        if place is not None:
            answers[t] = tokens[place]
    return answers


def word_problem(task, tokens):
    """Permutes real things: what was at place i goes to place p[i]."""
    elements = sorted(permutations(range(task.degree)))
    answers, where = {}, list(range(task.degree))
    for t, token in enumerate(tokens):
        if task.by_swaps:
            one, other = token - 1, token
            if token:
                where = [{one: other, other: one}.get(place, place) for place in where]
        else:
            where = [elements[token][place] for place in where]
        answers[t] = elements.index(tuple(where))
    return answers


def modular_counting(task, tokens):
    answers, place = {}, 0
    for t, token in enumerate(tokens):
        place = {0: place - 1, 1: place, 2: place + 1}[token] % task.modulus
        answers[t] = place
    return answers


def automaton(task, tokens):
    answers, state = {}, 0
    for t, token in enumerate(tokens):
        state = task.steps[token][state]
        answers[t] = state
    return answers


def dyck(task, tokens):
    word = "".join("([)]"[token] for token in tokens)
    answers = {}
    for t, bracket in enumerate(word):
        rest = word[: t + 1]
        while "()" in rest or "[]" in rest:
            rest = rest.replace("()", "").replace("[]", "")
        assert set(rest) <= set("(["), f"{word} is not well nested"
        assert len(rest) <= task.max_depth
        if bracket in ")]":
            answers[t] = {"(": 1, "[": 2}[rest[-1]] if rest else 0
    return answers


def needle(task, tokens):
    mark, question = task.values, task.values + 1
    places = [t for t, token in enumerate(tokens) if token == mark]
    found = {tokens[t + 1]: tokens[t + 2] for t in places}
    assert len(found) == len(places) == task.needles
    assert tokens.index(question) == len(tokens) - 2
    assert all(t + 2 < len(tokens) - 2 for t in places)
    assert all(b - a >= 3 for a, b in pairwise(places))
    return {len(tokens) - 1: found[tokens[-1]]}


def selective_copying(task, tokens):
    blank, mark = task.values, task.values + 1
    items = [token for token in tokens if token not in (blank, mark)]
    room = len(tokens) - task.items
    assert len(items) == task.items
    assert [t for t, token in enumerate(tokens) if token == mark] == list(range(room, len(tokens)))
    return {room + i: item for i, item in enumerate(items)}


SOLVERS = {
    "keep-nth": keep_nth,
    "parity": parity,
    "mqar": mqar,
    "1-hop": k_hop,
    "2-hop": k_hop,
    "s3": word_problem,
    "s5": word_problem,
    "s5-swaps": word_problem,
    "modular-counting": modular_counting,
    "automaton": automaton,
    "dyck-2": dyck,
    "needle": needle,
    "selective-copying": selective_copying,
}
