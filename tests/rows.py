"""Rows of real layouts, each with the images and the messages that it holds, and short words for messages."""

import json


IMAGE = {"bytes": b"...", "path": "/a.jpg"}
OTHER = {"bytes": b"other", "path": None}


def user(*content):
    return {"role": "user", "content": [{"type": "image"} if part == "image" else text(part) for part in content]}


def assistant(answer):
    return {"role": "assistant", "content": [text(answer)]}


def text(words):
    return {"type": "text", "text": words}


def turns(*said, speakers=("human", "gpt")):
    return [{"from": speakers[number % 2], "value": text} for number, text in enumerate(said)]


def messages(*said):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


def spoken(conversation):
    """What a conversation says, without what it says of itself."""
    return {
        key: value
        for key, value in conversation.items()
        if key not in ("notes", "answers", "choices", "kind", "subset", "id")
    }


DIALOGUE = [user("What?"), assistant("A dog."), user("Sure?"), assistant("Yes.")]
CAPTIONED = [user("image"), assistant("A dog.")]
SHOWN = [user("image", "What?"), *DIALOGUE[1:]]

# Rows of a data set, each with the images and the messages that it holds. Where rows differ, `datasets` adds nulls.
FORMATS = {
    "TRL messages, content as text": [
        ({"messages": messages("What?", "A dog.", "Sure?", "Yes."), "images": [IMAGE]}, [IMAGE], SHOWN),
        ({"messages": messages("Hi.", "Hello."), "images": []}, [], [user("Hi."), assistant("Hello.")]),
        (
            {"messages": [{**user("Hi."), "content": "Hi."}, {**messages("", "")[1], "train": False, "weight": 0.5}]},
            [],
            [user("Hi."), {**assistant(""), "train": False, "weight": 0.5}],
        ),
    ],
    "TRL messages, content as parts": [
        (
            {"images": [IMAGE, OTHER], "messages": [user("image", "and", "image"), assistant("Dogs.")]},
            [IMAGE, OTHER],
            [user("image", "and", "image"), assistant("Dogs.")],
        ),
        ({"images": None, "messages": [user("Hi."), assistant("Hello.")]}, [], [user("Hi."), assistant("Hello.")]),
        # llava-instruct-mix-vsft numbers its image parts.
        (
            {
                "images": [IMAGE],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image", "index": 0}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
                ],
            },
            [IMAGE],
            [user("Look", "image"), assistant("Yes.")],
        ),
    ],
    "messages with their images in the parts": [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": "/a.jpg"}, text("What?")]},
                    assistant("A dog."),
                    {"role": "user", "content": [text("And"), {"type": "image", "image": OTHER}]},
                    assistant("Another."),
                ]
            },
            ["/a.jpg", OTHER],
            [user("image", "What?"), assistant("A dog."), user("And", "image"), assistant("Another.")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "url": "https://x.org/a.jpg"}, text("What?")]},
                    {"role": "user", "content": [{"type": "image", "base64": "AAAA"}]},
                ]
            },
            ["https://x.org/a.jpg", "data:image/*;base64,AAAA"],
            [user("image", "What?"), user("image")],
        ),
        ({"messages": [user("Hi."), assistant("Hello.")]}, [], [user("Hi."), assistant("Hello.")]),
    ],
    "OpenAI messages": [
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            text("What?"),
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
                            {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}},
                        ],
                    },
                    assistant("A dog."),
                ]
            },
            ["data:image/png;base64,AA", "https://x.org/a.jpg"],
            [user("What?", "image", "image"), assistant("A dog.")],
        )
    ],
    "messages as JSON": [
        ({"messages": json.dumps(messages("What?", "A dog.")), "image": IMAGE}, [IMAGE], SHOWN[:2]),
    ],
    "TRL prompt and completion, texts": [
        ({"prompt": "What?", "completion": "A dog.", "image": IMAGE}, [IMAGE], SHOWN[:2]),
        ({"prompt": "Hi.", "completion": ""}, [], [user("Hi."), assistant("")]),
    ],
    "TRL prompt and completion, messages": [
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, *messages("What?", "A dog.", "Sure?")],
                "completion": [{"role": "assistant", "content": "Yes."}],
                "images": [IMAGE],
            },
            [IMAGE],
            [
                {"role": "system", "content": [text("Be brief.")]},
                user("image", "What?"),
                {**assistant("A dog."), "train": False},
                user("Sure?"),
                assistant("Yes."),
            ],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Hi."}],
                "completion": [{"role": "assistant", "content": "Hello.", "weight": 2.0}],
            },
            [],
            [user("Hi."), {**assistant("Hello."), "weight": 2.0}],
        ),
    ],
    "LLaVA": [
        (
            {"id": "1", "image": "/coco/1.jpg", "conversations": turns("<image>\nWhat?", "A dog.", "Sure?", "Yes.")},
            ["/coco/1.jpg"],
            SHOWN,
        ),
        (
            {"image": "/coco/2.jpg", "conversations": turns("What?\n<image>", "A")},
            ["/coco/2.jpg"],
            [user("What?", "image"), assistant("A")],
        ),
        ({"image": "/coco/3.jpg", "conversations": turns("What?", "A dog.")}, ["/coco/3.jpg"], SHOWN[:2]),
        # mix665k's dialogues without image
        (
            {"id": "4", "model": "", "conversations": turns("What is <image>?", "A tag.")},
            [],
            [user("What is <image>?"), assistant("A tag.")],
        ),
    ],
    "LLaVA with several images": [
        (
            {
                "image": [IMAGE, OTHER, IMAGE],
                "conversations": turns("<image>\n<image>\n\nBoth", "<image> is said.", " then <image>now", "Yes."),
            },
            [IMAGE, OTHER, IMAGE],
            [
                user("image", "image", "\nBoth"),
                assistant("<image> is said."),
                user(" then ", "image", "now"),
                assistant("Yes."),
            ],
        ),
        ({"image": [], "conversations": turns("Hi.", "Hello.")}, [], [user("Hi."), assistant("Hello.")]),
        (
            {"image": [IMAGE], "conversations": turns("<image>", "A dog.")},
            [IMAGE],
            [user("image"), assistant("A dog.")],
        ),
        ({"image": [IMAGE], "conversations": turns("", "A dog.")}, [IMAGE], [user("image", ""), assistant("A dog.")]),
    ],
    "LLaVA-OneVision": [
        (
            {"id": "1", "image": IMAGE, "conversations": turns("<image>\nWhat?", "A dog."), "data_source": "x"},
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"id": "2", "image": None, "conversations": turns("Hi.", "Hello."), "data_source": "y"},
            [],
            [user("Hi."), assistant("Hello.")],
        ),
    ],
    "MiniCPM": [
        ({"image": "/a.jpg", "conversations": messages("<image>\nWhat?", "A dog.")}, ["/a.jpg"], SHOWN[:2]),
    ],
    "ShareGPT": [
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, *turns("What?", "A dog.")], "system": ""},
            [],
            [{"role": "system", "content": [text("Be brief.")]}, *DIALOGUE[:2]],
        ),
        (
            {
                "conversations": [
                    {**turn, "weight": 1.0} for turn in turns("What?", "A dog.", speakers=("user", "model"))
                ],
                "system": "Be kind.",
            },
            [],
            [{"role": "system", "content": [text("Be kind.")]}, *[{**m, "weight": 1.0} for m in DIALOGUE[:2]]],
        ),
        ({"conversations": turns("What?", "A dog.", "Sure?", "Yes.", speakers=("user", "chatgpt"))}, [], DIALOGUE),
    ],
    "ShareGPT in the singular": [
        (
            {"conversation": turns("What?", "A dog.", "Sure?", speakers=("human", "bot")), "system_prompt": None},
            [],
            DIALOGUE[:3],
        ),
        (
            {"conversation": turns("What?", speakers=("human", "assistant")), "system_prompt": "Hm."},
            [],
            [{"role": "system", "content": [text("Hm.")]}, *DIALOGUE[:1]],
        ),
    ],
    "the_cauldron": [
        (
            {
                "images": [IMAGE],
                "texts": [
                    {"user": "What?", "assistant": "A dog.", "source": "AI2D"},
                    {"user": "Sure?", "assistant": "Yes.", "source": "AI2D"},
                ],
            },
            [IMAGE],
            SHOWN,
        ),
        (
            {"images": [IMAGE, OTHER], "texts": [{"user": "Hm", "assistant": ""}]},
            [IMAGE, OTHER],
            [user("image", "image", "Hm"), assistant("")],
        ),
    ],
    "FineVision": [
        (
            {
                "images": [IMAGE],
                "texts": [{"user": "What?", "assistant": "A dog."}],
                "source": "a",
                "relevance_ratings": [5],
                "relevance_min": 5,
            },
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"images": [], "texts": [{"user": "Hi.", "assistant": "Hello."}], "source": "b"},
            [],
            [user("Hi."), assistant("Hello.")],
        ),
    ],
    "VQA-RAD": [
        ({"image": IMAGE, "question": "What?", "answer": "A dog."}, [IMAGE], SHOWN[:2]),
        ({"image": None, "question": "Hi.", "answer": ""}, [], [user("Hi."), assistant("")]),
    ],
    "TextVQA": [
        ({"image": IMAGE, "question": "What?", "answers": ["cat", "A dog.", "bird", "A dog."]}, [IMAGE], SHOWN[:2]),
        ({"image": IMAGE, "question": "What?", "answers": ["A dog.", "cat"]}, [IMAGE], SHOWN[:2]),
    ],
    "VQAv2": [
        (
            {
                "question_type": "what is",
                "multiple_choice_answer": "A dog.",
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(["cat", "A dog."])
                ],
                "image": IMAGE,
                "question": "What?",
            },
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"answers": [{"answer": a} for a in ("cat", "A dog.", "A dog.")], "image": IMAGE, "question": "What?"},
            [IMAGE],
            SHOWN[:2],
        ),
    ],
    "VQAv2 with a sequence of structs": [
        (
            {
                "answers": {"answer": ["cat", "A dog.", "A dog."], "answer_id": [1, 2, 3]},
                "image": IMAGE,
                "question": "What?",
            },
            [IMAGE],
            SHOWN[:2],
        ),
    ],
    "WebDataset of captions": [
        (
            {
                "__key__": "0",
                "__url__": "x.tar",
                "jpg": IMAGE,
                "png": None,
                "txt": "A dog.\n",
                "json": {"caption": "no", "width": 3},
            },
            [IMAGE],
            CAPTIONED,
        ),
        ({"__key__": "1", "__url__": "x.tar", "jpg": None, "png": OTHER, "txt": "A dog.\n"}, [OTHER], CAPTIONED),
    ],
    "WebDataset of dialogues": [
        (
            {
                "__key__": "0",
                "__url__": "x.tar",
                "jpeg": IMAGE,
                "json": {"image": "0.jpg", "__x__": 1, "conversations": turns("<image>\nWhat?", "A dog.")},
            },
            [IMAGE],
            SHOWN[:2],
        ),
        (
            {"__key__": "1", "__url__": "x.tar", "jpeg": IMAGE, "json": {"question": "What?", "answer": "A dog."}},
            [IMAGE],
            SHOWN[:2],
        ),
    ],
    "Flickr30k": [
        (
            {
                "image": IMAGE,
                "caption": ["A dog."],
                "sentids": ["1"],
                "split": "train",
                "img_id": "0",
                "filename": "0.jpg",
            },
            [IMAGE],
            CAPTIONED,
        ),
    ],
}
ROWS = [(name, row) for name, rows in FORMATS.items() for row, _, _ in rows]
