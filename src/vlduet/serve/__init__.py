"""One process that answers chats and embeds, over HTTP in OpenAI's forms."""
