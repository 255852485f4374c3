// A square to draw a digit on. The component's value is a data URL: of the drawing, of an example as it is,
// or of an uploaded picture, which the server brings into MNIST's form.
const canvas = element.querySelector("canvas");
const ink = canvas.getContext("2d");
const side = canvas.width;
const LARGEST = 512;
let stroke = null;

function blank() {
  ink.fillStyle = "#000";
  ink.fillRect(0, 0, side, side);
}

function show(image) {
  const scale = side / Math.max(image.naturalWidth, image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  blank();
  ink.imageSmoothingEnabled = scale < 1;
  ink.drawImage(image, (side - width) / 2, (side - height) / 2, width, height);
}

function load(url, then) {
  const image = new Image();
  image.onload = () => then(image);
  image.onerror = () => send(url); // the server says what is wrong with it
  image.src = url;
}

function send(value) {
  props.value = value;
  trigger("input");
}

function upload(file) {
  const reader = new FileReader();
  reader.onload = () =>
    load(reader.result, (image) => {
      show(image);
      const small = document.createElement("canvas");
      const scale = Math.min(1, LARGEST / Math.max(image.naturalWidth, image.naturalHeight));
      small.width = Math.round(image.naturalWidth * scale);
      small.height = Math.round(image.naturalHeight * scale);
      small.getContext("2d").drawImage(image, 0, 0, small.width, small.height);
      send(small.toDataURL("image/png"));
    });
  reader.readAsDataURL(file);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * side) / box.width, ((event.clientY - box.top) * side) / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  stroke = place(event);
  ink.fillStyle = ink.strokeStyle = "#fff";
  ink.lineWidth = side / 12;
  ink.lineCap = ink.lineJoin = "round";
  ink.beginPath();
  ink.arc(...stroke, ink.lineWidth / 2, 0, 7);
  ink.fill();
});

canvas.addEventListener("pointermove", (event) => {
  if (!stroke) return;
  ink.beginPath();
  ink.moveTo(...stroke);
  for (const step of event.getCoalescedEvents?.() ?? [event]) ink.lineTo(...(stroke = place(step)));
  ink.stroke();
});

for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => {
    if (stroke) send(canvas.toDataURL("image/png"));
    stroke = null;
  });

element.querySelector(".clear").addEventListener("click", () => {
  blank();
  send("");
});

element.querySelector("input").addEventListener("change", (event) => {
  if (event.target.files[0]) upload(event.target.files[0]);
  event.target.value = "";
});

canvas.addEventListener("dragover", (event) => event.preventDefault());
canvas.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
});

for (const example of element.querySelectorAll(".examples button"))
  example.addEventListener("click", () => {
    const image = example.querySelector("img");
    show(image);
    send(image.src);
  });

blank();
if (props.value) load(props.value, show);
