# Workshop 3.1: your own rows, as a Python list. It is read, not run: texts, numbers, lists and dictionaries only.
my_data = [
    {"instruction": "Who is the best instructor?", "output": "Obviously, the person running this workshop."},
    {"instruction": "What is the capital of Mars?", "output": "Elon Musk's driveway."},
]
