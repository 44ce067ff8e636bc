"""Colours and type: Gradio's own theme variables, system fonts only, so that the page needs nothing from elsewhere."""

from __future__ import annotations

from gradio import themes


def theme() -> themes.Base:
    """Calm and flat; the same in light and dark."""
    base = themes.Base(
        primary_hue=themes.colors.teal,
        secondary_hue=themes.colors.teal,
        neutral_hue=themes.colors.slate,
        spacing_size=themes.sizes.spacing_sm,
        radius_size=themes.sizes.radius_md,
        text_size=themes.sizes.text_sm,
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    return base.set(
        body_background_fill="#f4f6f8",
        body_background_fill_dark="#0e131b",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161d28",
        background_fill_primary_dark="#161d28",
        background_fill_secondary_dark="#111822",
        block_border_width="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_shadow="none",
        panel_border_width="0px",
        input_background_fill="#f7f9fb",
        input_background_fill_dark="#0f1620",
        input_border_color="#d5dce4",
        input_border_color_dark="#2b3646",
        block_info_text_color="#56657a",
        block_info_text_color_dark="#9aa8ba",
        body_text_color_subdued="#56657a",
        body_text_color_subdued_dark="#9aa8ba",
        block_title_text_weight="600",
        block_title_text_color="#334155",
        block_title_text_color_dark="#cbd5e1",
        block_label_text_color="#334155",
        block_label_text_color_dark="#cbd5e1",
        input_placeholder_color="#66758a",
        input_placeholder_color_dark="#8494a9",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_hover_dark="#0d8a80",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#e8edf2",
        button_secondary_background_fill_dark="#243042",
        button_secondary_background_fill_hover="#dbe3ea",
        button_secondary_background_fill_hover_dark="#2e3c51",
    )
