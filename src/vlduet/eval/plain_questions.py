"""Questions without an image, with answers: they show what training makes a model forget."""

from __future__ import annotations

PLAIN_QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey."),
    ("What color is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What is two plus three?", "Two plus three is five."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is ice?", "Ice is frozen water."),
    ("Why do people sleep?", "People sleep so that their body and mind can rest and recover."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What do plants need to grow?", "Plants need water, light and soil to grow."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("What does a doctor do?", "A doctor helps people who are sick or injured."),
    ("Where does rain come from?", "Rain comes from clouds."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("What language do people speak in Spain?", "People speak Spanish in Spain."),
    ("Why do we wear coats in winter?", "We wear coats in winter to stay warm."),
    ("What is a library?", "A library is a place where people can read and borrow books."),
    ("What comes after Monday?", "Tuesday comes after Monday."),
    ("How do birds fly?", "Birds fly by flapping their wings."),
    ("What is bread made from?", "Bread is made from flour, water and yeast."),
    ("When does the sun rise?", "The sun rises in the morning."),
    ("What is a promise?", "A promise is a statement that you will do something."),
    ("What should I do if I am tired?", "You should rest and get some sleep."),
)
"""(question, answer) pairs that any chat model should know. Nothing is trained on them."""
