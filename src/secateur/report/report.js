
"use strict";
(() => {
  const root = document.documentElement;
  window.onerror = (message) => { root.dataset.errors = (root.dataset.errors || "") + message + "\n"; };
  const $ = (id) => document.getElementById(id);

  // The record: layers come as columns and rows to keep the page small.
  const unpack = (run) => {
    const packed = run.layers;
    if (packed && packed.columns)
      run.layers = packed.rows.map((row) => Object.fromEntries(packed.columns.map((key, i) => [key, row[i]])));
    return run;
  };
  const record = JSON.parse($("record").textContent);
  unpack(record.run);
  record.compare.forEach(unpack);

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

  // The layer table: sort and filter.
  const table = $("layers");
  if (table) {
    const body = table.tBodies[0];
    const layers = record.run.layers.filter((x) => x && typeof x === "object" && !Array.isArray(x));
    const rows = [...body.rows].map((row, i) => {
      const x = layers[i] || {};
      const sparsity = typeof x.sparsity === "number" ? x.sparsity : parseFloat(row.cells[5].textContent);
      return { row, i, text: row.textContent.toLowerCase(), block: String(x.block),
        key: { ...x, name: i, shape: x.parameters, sparsity, notes: row.cells[8].textContent } };
    });
    const buttons = [...table.tHead.querySelectorAll("button")];
    buttons.forEach((button) => {
      button.onclick = () => {
        const head = button.parentNode, key = button.dataset.k;
        const numeric = key !== "name" && key !== "notes";
        const first = numeric || key === "notes" ? "descending" : "ascending";
        const now = head.getAttribute("aria-sort");
        const way = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
        buttons.forEach((b) => b.parentNode.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", way);
        const sign = way === "ascending" ? 1 : -1;
        const empty = (a) => a === null || a === undefined || a === "" || Number.isNaN(a);
        rows.sort((p, q) => {
          const a = p.key[key], b = q.key[key];
          if (empty(a) || empty(b)) return empty(a) - empty(b) || p.i - q.i;
          return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)))
            || p.i - q.i;
        });
        body.append(...rows.map((r) => r.row));
      };
    });
    const filter = $("filter"), shown = $("shown");
    filter.oninput = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      for (const r of rows) {
        const fits = words.every((w) => (/^\d+$/.test(w) ? r.block === w || r.text.includes("." + w + ".") : r.text.includes(w)));
        r.row.hidden = !fits;
        n += fits;
      }
      shown.textContent = words.length ? n + " of " + rows.length + " layers" : rows.length + " layers";
    };
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
    const csv = () => {
      const keys = [...new Set(layers.flatMap(Object.keys))];
      return [keys.map(cell), ...layers.map((x) => keys.map((k) => cell(x[k])))].map((r) => r.join(",")).join("\r\n") + "\r\n";
    };
    $("csv").onclick = () => save("layers.csv", "text/csv", csv());
    $("json").onclick = () => save("run.json", "application/json",
      JSON.stringify(record.compare.length ? record : record.run, null, 2) + "\n");
  }

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
  root.dataset.ready = "1";
})();
