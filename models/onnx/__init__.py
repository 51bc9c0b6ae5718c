"""ONNX files as models, run by ONNX Runtime."""
