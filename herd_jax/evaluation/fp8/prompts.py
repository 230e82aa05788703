"""Prompts of the FP8 test where a user has none: questions, and texts full of the rare tokens that give large activations, dates above all."""

_DATES = ("14 July 1789", "1969-07-20T20:17:40Z", "29/02/2024", "the 31st of December 1999", "3 Brumaire, Year IV", "Friday, 13.10.1307")
_NAMES = ("Ouagadougou", "Kyrgyzstan", "Llanfairpwllgwyngyll", "Xiuhcoatl", "Szymborska")
_NUMBERS = ("3.14159265358979", "299,792,458", "0x7FFFFFFF", "1,048,576", "6.022e23")

PROMPTS = (
    *(f"What happened on {date}, and how many days are there from then to 1 January 2000?" for date in _DATES),
    *(f"Write one sentence that has the date {date} in it." for date in _DATES),
    *(f"What do you know of {name}? Answer in two sentences." for name in _NAMES),
    *(f"Where does the number {number} occur?" for number in _NUMBERS),
    "What is the capital of France, and what is it known for?",
    "Explain why the sky is blue to a child of six.",
    "Write a Python function that tells whether a number is prime.",
    "A train leaves at 14:35 and arrives at 17:10. How long does it travel?",
    "Translate into French: The library opens at nine in the morning.",
    "Give three reasons to learn a second language.",
    "Sort these words by the alphabet: pear, apple, quince, fig, banana.",
    "Write a short poem on rain in October.",
    "What is the difference between a virus and a bacterium?",
    "Summarise in one sentence what photosynthesis does.",
)
