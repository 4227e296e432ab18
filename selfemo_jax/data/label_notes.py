"""What the labels of MELD, EmoryNLP and IEMOCAP mean, in one line each: the emotional descriptions of a
prompt."""

LABEL_NOTES = {
    "neutral": "no feeling stands out; plain talk, facts, routine",
    "surprise": "something was not expected, welcome or not; disbelief, startled questions",
    "fear": "a threat is felt; worry, panic, nerves",
    "sadness": "a loss or a hurt; disappointment, regret, loneliness",
    "sad": "a loss or a hurt; disappointment, regret, loneliness",
    "joy": "something is good; delight, amusement, affection, relief",
    "joyful": "something is good; delight, amusement, laughter, high spirits",
    "happy": "something is good; content, amused, fond, calm rather than wild",
    "disgust": "something is repellent; distaste, contempt, shame at somebody",
    "anger": "a wrong is felt; annoyance, blame, shouting, bitter irony",
    "angry": "a wrong is felt; blame, shouting, threats, bitter irony",
    "mad": "a wrong is felt; annoyance, blame, jealousy, bitter irony",
    "peaceful": "calm and warm towards others; trust, care, thanks, tenderness",
    "powerful": "sure of oneself; pride, confidence, being in charge, encouragement",
    "scared": "a threat is felt; worry, panic, nerves, confusion",
    "excited": "something good is near or just came; eager, loud, full of energy",
    "frustrated": "something will not work out in spite of trying; fed up, helpless, impatient",
}
"""Label -> words of ours; a label of another set is told without."""
