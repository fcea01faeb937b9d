"use strict";
// What every page of secateur does: theme, plots that are read by mouse and keyboard, copying, saving.
const page = (() => {
  const root = document.documentElement;
  window.onerror = (message) => { root.dataset.errors = (root.dataset.errors || "") + message + "\n"; };
  const $ = (id) => document.getElementById(id);

  // Theme: the system's until somebody chooses.
  const themes = ["system", "light", "dark"];
  const button = $("theme");
  const wear = (theme) => {
    if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
  };
  const asked = new URLSearchParams(location.search).get("theme");
  wear(themes.includes(asked) ? asked : "system");
  button.hidden = false;
  button.onclick = () => wear(themes[(themes.indexOf(root.dataset.theme || "system") + 1) % 3]);

  // Tooltips: the nearest point, by mouse, touch or arrow keys.
  const tip = $("tip"), say = $("say");
  document.querySelectorAll(".chart").forEach((box) => {
    const svg = box.querySelector("svg"), ring = box.querySelector(".ring");
    if (!ring) return;
    const points = [...box.querySelectorAll("use[data-t]")].map((e) => ({
      x: +e.getAttribute("x"), y: +e.getAttribute("y"), text: e.dataset.t, group: e.parentNode }));
    let at = null;
    const live = () => points.filter((p) => !p.group.classList.contains("gone"));
    const hide = () => { tip.hidden = true; ring.style.visibility = "hidden"; at = null; };
    const show = (p, spoken) => {
      if (!p) return hide();
      if (p !== at) {
        at = p;
        const [head, ...rest] = p.text.split("|");
        tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: head }), rest.join(" · "));
        ring.setAttribute("cx", p.x);
        ring.setAttribute("cy", p.y);
        ring.style.visibility = "visible";
        if (spoken) say.textContent = p.text.replaceAll("|", ", ");
      }
      tip.hidden = false;
      const m = svg.getScreenCTM(), x = m.a * p.x + m.e, y = m.d * p.y + m.f;
      const w = tip.offsetWidth, h = tip.offsetHeight;
      tip.style.left = Math.max(6, Math.min(root.clientWidth - w - 6, x - w / 2)) + "px";
      tip.style.top = (y - h - 12 > 4 ? y - h - 12 : y + 14) + "px";
    };
    svg.addEventListener("pointermove", (event) => {
      const m = svg.getScreenCTM();
      const x = (event.clientX - m.e) / m.a, y = (event.clientY - m.f) / m.d;
      let best = null, least = 900;
      for (const p of live()) {
        const d = (p.x - x) ** 2 + (p.y - y) ** 2;
        if (d < least) { least = d; best = p; }
      }
      show(best);
    });
    svg.addEventListener("pointerleave", hide);
    box.addEventListener("blur", hide);
    box.addEventListener("scroll", () => { if (at) show(at); });
    box.addEventListener("keydown", (event) => {
      const sign = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (event.key === "Escape") return hide();
      if (!sign || !points.length) return;
      event.preventDefault();
      const here = live();
      if (!here.length) return;
      let next = here[0];
      if (at && event.key.length > 8 && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
        const row = here.filter((p) => p.group === at.group);
        next = row[(row.indexOf(at) + sign + row.length) % row.length];
      } else if (at) {
        const groups = [...new Set(here.map((p) => p.group))];
        const group = groups[(groups.indexOf(at.group) + sign + groups.length) % groups.length];
        const from = at.x;
        next = here.filter((p) => p.group === group)
          .reduce((a, b) => (Math.abs(b.x - from) < Math.abs(a.x - from) ? b : a));
      }
      const m = svg.getScreenCTM(), left = box.getBoundingClientRect().left, x = m.a * next.x + m.e - left;
      if (x < 40 || x > box.clientWidth - 40) box.scrollLeft += x - box.clientWidth / 2;
      show(next, true);
    });
    // The legend: point at a series to see it alone, press to hide it.
    box.parentNode.querySelectorAll(".key").forEach((key) => {
      const group = box.querySelector(`g[data-s="${key.dataset.s}"]`);
      const focus = (on) => { svg.classList.toggle("focus", on); group.classList.toggle("on", on); };
      key.onpointerenter = key.onfocus = () => { if (!group.classList.contains("gone")) focus(true); };
      key.onpointerleave = key.onblur = () => focus(false);
      key.onclick = () => {
        const gone = group.classList.toggle("gone");
        key.setAttribute("aria-pressed", String(!gone));
        focus(!gone);
        hide();
      };
    });
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Downloads, made here from the record in this page.
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    let text = Array.isArray(value) ? value.join(typeof value[0] === "number" ? "x" : "; ") : String(value);
    if (/^[=+\-@\t\r]/.test(text)) text = "'" + text; // a spreadsheet must not run it
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  const line = (cells) => cells.map(cell).join(",") + "\r\n";

  // A table whose heads are buttons; rows are {row, i, key}, and what is empty comes last either way.
  const sorts = (table, rows, texts) => {
    const buttons = [...table.tHead.querySelectorAll("button")];
    const empty = (a) => a === null || a === undefined || a === "" || Number.isNaN(a);
    buttons.forEach((button) => {
      button.onclick = () => {
        const head = button.parentNode, key = button.dataset.k;
        const now = head.getAttribute("aria-sort"), first = texts.includes(key) ? "ascending" : "descending";
        const way = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
        buttons.forEach((b) => b.parentNode.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", way);
        const sign = way === "ascending" ? 1 : -1;
        rows.sort((p, q) => {
          const a = p.key[key], b = q.key[key];
          if (empty(a) || empty(b)) return empty(a) - empty(b) || p.i - q.i;
          return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)))
            || p.i - q.i;
        });
        table.tBodies[0].append(...rows.map((r) => r.row));
      };
    });
  };

  // A plot as a file of its own: styles written into it, markers and legend taken along.
  const KEPT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family",
    "font-weight", "text-anchor", "display", "visibility"];
  const picture = (box) => {
    const from = box.querySelector("svg"), svg = from.cloneNode(true);
    const dress = (a, b) => {
      const style = getComputedStyle(a);
      b.setAttribute("style", KEPT.map((k) => k + ":" + style.getPropertyValue(k)).join(";"));
      b.removeAttribute("data-t");
      [...a.children].forEach((child, i) => dress(child, b.children[i]));
    };
    dress(from, svg);
    svg.querySelectorAll(".ring").forEach((ring) => ring.remove());
    const make = (name, marks, text) => {
      const one = document.createElementNS(from.namespaceURI, name);
      Object.entries(marks).forEach(([k, value]) => one.setAttribute(k, value));
      if (text) one.textContent = text;
      return one;
    };
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    let x = 12, y = height + 18;
    const body = getComputedStyle(document.body);
    box.parentNode.querySelectorAll(".key[aria-pressed=true]").forEach((key) => {
      const label = key.textContent.trim(), wide = 34 + 7.4 * label.length, color = getComputedStyle(key.querySelector("svg")).color;
      if (x + wide > width) { x = 12; y += 20; }
      svg.append(make("use", { href: key.querySelector("use").getAttribute("href"), x: x + 6, y: y - 4, fill: color }));
      svg.append(make("text", { x: x + 16, y, fill: body.color, "font-size": 13, "font-family": body.fontFamily }, label));
      x += wide;
    });
    const tall = y + 10;
    svg.prepend(make("rect", { x: -4, y: -4, width: width + 8, height: tall + 8, fill: body.backgroundColor }));
    const defs = document.querySelector("svg.defs defs");
    if (defs) svg.prepend(defs.cloneNode(true));
    svg.setAttribute("viewBox", `-4 -4 ${width + 8} ${tall + 8}`);
    return new XMLSerializer().serializeToString(svg) + "\n";
  };
  document.querySelectorAll("[data-svg]").forEach((button) => {
    button.hidden = false;
    button.onclick = () => save(button.dataset.svg + ".svg", "image/svg+xml", picture(button.closest("figure").querySelector(".chart")));
  });

  document.querySelectorAll("[data-copy]").forEach((copy) => {
    const code = copy.parentNode.querySelector("code");
    copy.hidden = false;
    copy.onclick = async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1600);
    };
  });
  return { root, $, save, line, sorts };
})();
