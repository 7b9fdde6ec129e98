// The player: one video holds all panes, so they cannot get out of step.
const player = document.querySelector(".player");
if (player) {
  const clips = JSON.parse(document.getElementById("clips").textContent);
  const find = (name) => player.querySelector(`[data-role=${name}]`);
  const [canvas, wipe, place, frame, play, choice] =
    ["canvas", "wipe", "place", "frame", "play", "clip"].map(find);
  const pen = canvas.getContext("2d"), video = document.createElement("video");
  video.muted = video.loop = video.playsInline = true;
  let clip = clips[0], mode = "side";
  const draw = () => {
    const { width: w, height: h } = clip;
    canvas.width = mode === "side" ? 2 * w : w;
    canvas.height = h;
    pen.fillStyle = "#fff";
    if (mode === "side") {
      pen.drawImage(video, 0, 0, 2 * w, h, 0, 0, 2 * w, h);
      pen.fillRect(w - 1, 0, 2, h);
    }
    if (mode === "error") pen.drawImage(video, 2 * w, 0, w, h, 0, 0, w, h);
    if (mode === "wipe") {
      const x = Math.round(w * wipe.value / 100);
      pen.drawImage(video, 0, 0, w, h, 0, 0, w, h);
      pen.drawImage(video, w + x, 0, w - x, h, x, 0, w - x, h);
      pen.fillRect(x - 1, 0, 2, h);
    }
    const now = Math.min(clip.frames - 1, Math.floor(video.currentTime * clip.fps + 1e-3));
    frame.textContent = `frame ${now} of 0–${clip.frames - 1}`;
    if (document.activeElement !== place || !video.paused) place.value = now;
  };
  const run = () => { draw(); if (!video.paused) requestAnimationFrame(run); };
  const go = (index) => {
    video.pause();
    video.currentTime = (Math.max(0, Math.min(clip.frames - 1, index)) + 0.5) / clip.fps;
  };
  const choose = (index) => {
    clip = clips[index];
    choice.value = index;
    place.max = clip.frames - 1;
    video.src = clip.uri;
    find("about").textContent = clip.about;
  };
  const look = (name) => {
    mode = name;
    canvas.classList.toggle("single", name !== "side");
    for (const b of player.querySelectorAll("[data-mode]")) b.setAttribute("aria-pressed", b.dataset.mode === name);
    for (const t of player.querySelectorAll("[data-for]")) t.hidden = !t.dataset.for.split(" ").includes(name);
    draw();
  };
  video.addEventListener("loadeddata", () => go(0));
  video.addEventListener("seeked", draw);
  video.addEventListener("play", () => { play.textContent = "pause"; run(); });
  video.addEventListener("pause", () => { play.textContent = "play"; });
  play.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
  find("back").addEventListener("click", () => go(Number(place.value) - 1));
  find("on").addEventListener("click", () => go(Number(place.value) + 1));
  place.addEventListener("input", () => go(Number(place.value)));
  wipe.addEventListener("input", draw);
  choice.addEventListener("change", () => choose(Number(choice.value)));
  for (const b of player.querySelectorAll("[data-mode]")) b.addEventListener("click", () => look(b.dataset.mode));
  for (const b of document.querySelectorAll("[data-clip]")) {
    b.addEventListener("click", () => { choose(Number(b.dataset.clip)); player.scrollIntoView(); });
  }
  choose(0);
  look("side");
}
