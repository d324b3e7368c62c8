"""Server: one process that chats and embeds with one copy of a model, over HTTP as OpenAI does."""
