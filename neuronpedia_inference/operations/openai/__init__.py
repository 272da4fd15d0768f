"""OpenAI's routes: chats, completions and models in its shapes, steered and watched like any other."""
