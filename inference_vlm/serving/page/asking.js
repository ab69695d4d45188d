// What is sent: turns as messages, within what the server takes.

/** A file as a picture: its bytes as a data URL, as they are, and its size where this browser can read it. */
export async function read(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  return measured({ url, name: file.name || "picture" });
}

/** A picture with its width and height; 0 where this browser cannot read it, which leaves it to the server. */
export async function measured(picture) {
  const image = new Image();
  image.src = picture.url;
  await image.decode().catch(() => {});
  return { ...picture, width: image.naturalWidth, height: image.naturalHeight };
}

/** Whether a turn is part of what is sent with a later one: one that was refused, or stopped before a word, is not. */
export function isAnswered(turn) {
  return Boolean(turn.answer) || turn.finish === "stop" || turn.finish === "length";
}

/** The messages of a turn and of those before it. */
export function messages(before, turn, system, captions) {
  if (captions && !turn.question) return [message(turn)]; // each caption by itself, as it was trained
  const earlier = before.filter(isAnswered).flatMap((one) => [message(one), { role: "assistant", content: one.answer }]);
  return [...(system ? [{ role: "system", content: system }] : []), ...earlier, message(turn)];
}

function message({ question, images }) {
  if (!images.length) return { role: "user", content: question };
  const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: question ? [...parts, { type: "text", text: question }] : parts };
}

/** What of pictures is more than the server takes in one request, in a line; nothing where it takes them. */
export function tooMuch(images, limits) {
  const mend = "Remove some, or begin a new conversation.";
  if (images.length > limits.images)
    return `The server takes ${count(limits.images, "picture")} a conversation; these would be ${images.length}. ${mend}`;
  const pixels = images.reduce((sum, { width, height }) => sum + width * height, 0) / 1e6;
  if (pixels > limits.megapixels)
    return `The server takes ${limits.megapixels} megapixels a conversation; these would be ${pixels.toFixed(1)}. ${mend}`;
  return tooLarge(images.reduce((sum, { url }) => sum + url.length, 0), limits);
}

/** Whether a request of so many bytes is larger than the server takes, in a line. */
export function tooLarge(bytes, limits) {
  if (bytes <= limits.body_bytes) return "";
  const [most, found] = [limits.body_bytes, bytes].map((size) => (size / 1e6).toFixed(1));
  return `The server takes ${most} MB a conversation; this would be ${found}. Remove pictures, or begin a new conversation.`;
}

/** What an answer took, for people. */
export function counts(turn, positions) {
  const said = [];
  if (turn.finish === "stopped") said.push(turn.answer ? "stopped" : "stopped, and left out of what follows");
  if (turn.usage) {
    const { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details: of } = turn.usage;
    const inside = [of.image_tokens && `${number(of.image_tokens)} of pictures`, of.cached_tokens && `${number(of.cached_tokens)} in memory`];
    const some = inside.filter(Boolean).join(", ");
    said.push(`${number(prompt_tokens)} tokens read${some && ` (${some})`}`, `${number(completion_tokens)} written`);
    if (positions) said.push(`${share(total_tokens, positions)}\u00a0% of the context`);
    if (turn.finish === "length") {
      const full = positions && total_tokens >= positions;
      said.push(full ? "cut: the context is full" : completion_tokens >= turn.most ? "cut: longest answer" : "cut: out of time");
    }
  }
  if (turn.expected) said.push(`right answer: ${turn.expected}`);
  return said.join(" · ");
}

/** Percent of the context. */
export function share(tokens, positions) {
  return Math.min(100, Math.ceil((100 * tokens) / positions));
}

export function number(value) {
  return value.toLocaleString("en");
}

export function count(amount, noun) {
  return `${number(amount)} ${noun}${amount === 1 ? "" : "s"}`;
}
