"""What the clients are asked: small local data sets, none of which is downloaded."""

from __future__ import annotations

CHOICES = [
    ("The capital of France is", ["Paris", "Rome", "Oslo", "Cairo"], 0),
    ("The capital of Italy is", ["Madrid", "Rome", "Vienna", "Lima"], 1),
    ("The capital of Japan is", ["Seoul", "Beijing", "Tokyo", "Hanoi"], 2),
    ("The largest planet of the solar system is", ["Mars", "Venus", "Earth", "Jupiter"], 3),
    ("Water freezes at zero degrees", ["Celsius", "Kelvin", "north", "a week"], 0),
    ("The opposite of hot is", ["warm", "cold", "loud", "green"], 1),
    ("Two plus two is", ["three", "five", "four", "nine"], 2),
    ("A week has this many days:", ["five", "six", "eight", "seven"], 3),
    ("Bees make", ["honey", "milk", "bread", "paper"], 0),
    ("Shakespeare wrote the play", ["Faust", "Hamlet", "Medea", "Tartuffe"], 1),
    ("The chemical symbol of gold is", ["Ag", "Fe", "Au", "Pb"], 2),
    ("The first president of the United States was George", ["Bush", "Orwell", "Clooney",
     "Washington"], 3),
    ("Plants take in carbon", ["dioxide", "paper", "copies", "fiber"], 0),
    ("The sun rises in the", ["west", "east", "night", "bath"], 1),
    ("The language spoken in Brazil is", ["Spanish", "French", "Portuguese", "Greek"], 2),
    ("A triangle has this many sides:", ["five", "four", "two", "three"], 3),
    ("The currency of Japan is the", ["yen", "euro", "pound", "dollar"], 0),
    ("The heart pumps", ["air", "blood", "water", "sand"], 1),
    ("The author of the theory of relativity is Albert", ["Camus", "Hitchcock", "Einstein",
     "Schweitzer"], 2),
    ("The frozen form of water is called", ["steam", "mist", "rain", "ice"], 3),
    ("Dogs are known to", ["bark", "meow", "moo", "sing opera"], 0),
    ("The tallest mountain on Earth is Mount", ["Fuji", "Everest", "Etna", "Olympus"], 1),
    ("The Pacific is the largest", ["river", "lake", "ocean", "desert"], 2),
    ("At night we can see the moon and the", ["sun", "roots", "tides", "stars"], 3),
    ("The Great Wall is in", ["China", "Peru", "Egypt", "Canada"], 0),
    ("A doctor works in a", ["kitchen", "hospital", "garage", "circus"], 1),
    ("The square root of nine is", ["one", "two", "three", "four"], 2),
    ("Frogs begin their lives as", ["puppies", "chicks", "kittens", "tadpoles"], 3),
    ("The Earth goes around the", ["sun", "moon", "corner", "block"], 0),
    ("The color of grass is", ["red", "green", "blue", "purple"], 1),
]  # fmt: skip
"""(question, choices, index of the right one)"""

CONTINUATIONS = [
    "Once upon a time",
    "The capital of France is",
    "To make a cup of tea, first",
    "The three primary colors are",
    "In the year 1969, astronauts",
    "def fibonacci(n):",
    "The recipe needs two eggs,",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,",
    "The quick brown fox",
]
"""Beginnings of greedy continuations."""

CHATS = [
    "What is the capital of France?",
    "Name three colors.",
    "What is two plus two?",
    "Say hello in Spanish.",
    "What do bees make?",
    "Who wrote Hamlet?",
]
"""One user message each."""

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NEEDLE = "The pass key is 48213. Remember it. 48213 is the pass key. "
NEEDLE_CHOICES = ["48213", "71906", "33058", "90247"]


def long_context(repeats: int = 107) -> str:
    """A context of about 2,600 tokens, whose answer stands at its beginning."""
    return NEEDLE + FILLER * repeats + "What is the pass key? The pass key is"
