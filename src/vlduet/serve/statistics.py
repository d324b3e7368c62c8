"""Counts of the model's thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """Work of the model's thread: its state now, and totals since it started."""

    running_chats: int = 0
    """Chats that are answered or whose prompt is being prepared."""
    waiting_chats: int = 0
    waiting_embedding_items: int = 0
    """Texts and images that wait for being embedded."""
    generated_tokens: int = 0
    retrieved_images: int = 0
    """Images of the index in answers."""
    embedded_items: int = 0
    refused_requests: int = 0
    """Requests that were refused because too many were waiting."""
