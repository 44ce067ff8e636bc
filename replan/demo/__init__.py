"""The demo: a Gradio app around the editor. Everything a user sees or sends stays in that user's session."""
