// Images: those of the index, and files that the user chooses, drops or pastes.

import { make, makeButton } from "./dom.js";
import { send, serverUrl, storedKey } from "./api.js";

const MAX_PLAIN_BYTES = 3_000_000;
const MAX_SIDE = 2048;
const MAX_BYTES = 30_000_000;
const MAX_KEPT_IMAGES = 300;

// Images that were fetched with a key, by path: promises of blob URLs.
const kept = new Map();

/** Return an <img> that shows an image of the index, at most `size` pixels large. */
export function makeIndexImage(path, size, alt = "") {
  const image = make("img", { alt, loading: "lazy", decoding: "async" });
  image.onerror = () => image.replaceWith(make("span", { className: "missing" }, "No image"));
  showIndexImage(image, `${path}?size=${size}`);
  return image;
}

function showIndexImage(image, path) {
  if (!path.startsWith("/v1/images/")) return image.onerror();
  if (storedKey() === null) {
    image.src = serverUrl(path);
    return;
  }
  // An <img> cannot send the key, so the image is fetched and shown from memory.
  if (!kept.has(path)) {
    kept.set(path, fetchBlob(path).then((blob) => URL.createObjectURL(blob)));
    if (kept.size > MAX_KEPT_IMAGES) dropOldest();
  }
  kept.get(path).then(
    (url) => { image.src = url; },
    () => { kept.delete(path); image.onerror(); },
  );
}

function dropOldest() {
  const [path, promise] = kept.entries().next().value;
  kept.delete(path);
  promise.then((url) => URL.revokeObjectURL(url), () => {});
}

async function fetchBlob(path) {
  const response = await send(path);
  return response.blob();
}

/** Return an image of the index as an attachment: its name and its data: URL. */
export async function fetchIndexImage(path, name) {
  return { name, url: await readDataUrl(await fetchBlob(`${path}?size=1024`)) };
}

/**
 * Return an image file of the user as an attachment: its name and its data: URL.
 * Large images are scaled down to MAX_SIDE pixels. One that the browser cannot decode is sent as it
 * is, because the server reads more formats.
 */
export async function readImageFile(file) {
  const name = file.name || "image";
  if (file.size > MAX_BYTES) throw new Error(`${name} is larger than 30 MB. Use a smaller image.`);
  if (file.size > MAX_PLAIN_BYTES) {
    try {
      return { name, url: await scaleDown(file) };
    } catch {
      // An image in a format that this browser does not read.
    }
  }
  const type = file.type.startsWith("image/") ? file.type : "image/png";
  return { name, url: await readDataUrl(new Blob([file], { type })) };
}

async function scaleDown(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", {
    width: Math.round(bitmap.width * scale),
    height: Math.round(bitmap.height * scale),
  });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.92);
}

function readDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The image cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** Return the image files of a drop or of the clipboard. */
export function imageFiles(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => looksLikeImage(file));
}

function looksLikeImage(file) {
  return file.type.startsWith("image/") || /\.(heic|heif|avif|jfif|tiff?)$/i.test(file.name);
}

/** Return the thumbnail of an attachment with a button that removes it. */
export function makeAttachment({ name, url }, remove) {
  const image = make("img", { src: url, alt: name });
  image.onerror = () => image.replaceWith(make("span", { className: "missing" }, name));
  const button = makeButton("×", remove, { className: "remove", "aria-label": `Remove ${name}` });
  return make("span", { className: "attachment", title: name }, image, button);
}

/** Return an attachment as a part of a request. */
export function imagePart({ url }) {
  return { type: "image_url", image_url: { url } };
}
