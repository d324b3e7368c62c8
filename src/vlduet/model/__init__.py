"""One forward, two readings: a Hugging Face vision-language model that generates and embeds."""
