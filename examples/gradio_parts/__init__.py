"""What examples/gradio_demo.py is made of besides its page."""
