"use strict";
// The page is complete without this script; it adds the theme button, tabs, sorting, finding and
// the large view. It writes text only through textContent and cloned nodes, never as HTML.
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  // Theme: auto follows the system. A page opened from disk may have no storage.
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const remembered = () => { try { return localStorage.getItem("infogrowth-theme"); } catch { return null; } };
  const setTheme = (theme) => {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    button.dataset.now = theme;
    try { localStorage.setItem("infogrowth-theme", theme); } catch { /* not remembered */ }
  };
  setTheme(themes.includes(remembered()) ? remembered() : "auto");
  button.addEventListener("click", () =>
    setTheme(themes[(themes.indexOf(button.dataset.now) + 1) % themes.length]));

  // Tabs: click, or arrows, Home and End as the ARIA pattern asks.
  for (const list of all('[role="tablist"]')) {
    const tabs = all('[role="tab"]', list);
    const choose = (tab, focus) => {
      for (const other of tabs) {
        const chosen = other === tab;
        other.setAttribute("aria-selected", String(chosen));
        other.tabIndex = chosen ? 0 : -1;
        document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
      }
      if (focus) tab.focus();
    };
    tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => choose(tab, false));
      tab.addEventListener("keydown", (event) => {
        const last = tabs.length - 1;
        const to = { ArrowRight: index === last ? 0 : index + 1, ArrowLeft: index ? index - 1 : last,
          Home: 0, End: last }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        choose(tabs[to], true);
      });
    });
    choose(tabs[0], false);
  }

  // Values compare as numbers when they are; what is unknown comes last either way.
  const compare = (a, b, down) => {
    const [x, y] = [Number(a), Number(b)];
    if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return down ? y - x : x - y;
    if (a === "nan" || b === "nan") return (a === "nan") - (b === "nan");
    return down ? b.localeCompare(a) : a.localeCompare(b);
  };

  // Galleries: sort, find, and the first rows before all of them.
  const few = window.matchMedia("(max-width: 680px)").matches ? 12 : 24;
  for (const gallery of all("[data-gallery]")) {
    const cards = gallery.querySelector("[data-cards]");
    const key = gallery.querySelector("[data-sort]");
    const order = gallery.querySelector("[data-direction]");
    const find = gallery.querySelector("[data-find]");
    const status = gallery.querySelector("[data-status]");
    const more = gallery.querySelector("[data-all]");
    let open = false;
    const show = () => {
      const words = find ? find.value.trim().toLowerCase() : "";
      let found = 0;
      for (const card of cards.children) {
        const fits = !words || card.querySelector(".words").textContent.toLowerCase().includes(words);
        found += fits ? 1 : 0;
        card.hidden = !fits || (!open && found > few);
      }
      if (status) status.textContent = words ? `${found} found` : "";
      more.hidden = open || found <= few;
      more.textContent = `Show all ${found}`;
    };
    const sort = () => {
      const down = order.dataset.order === "down";
      order.textContent = down ? "largest first ↓" : "smallest first ↑";
      cards.append(...[...cards.children].sort((a, b) =>
        compare(a.dataset[key.value], b.dataset[key.value], down)));
      show();
    };
    key.addEventListener("change", sort);
    order.addEventListener("click", () => {
      order.dataset.order = order.dataset.order === "down" ? "up" : "down";
      sort();
    });
    find?.addEventListener("input", show);
    more.addEventListener("click", () => {
      const first = [...cards.children].find((card) => card.hidden);
      open = true;
      show();
      first?.querySelector("button")?.focus();
    });
    show();
  }

  // Tables: a click on a heading sorts, another one turns the order.
  for (const table of all("table.sortable")) {
    for (const heading of all("thead button", table)) {
      heading.addEventListener("click", () => {
        const cell = heading.closest("th");
        const down = cell.getAttribute("aria-sort") !== "descending";
        all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const name = heading.dataset.column;
        body.append(...[...body.rows].sort((a, b) => compare(a.dataset[name], b.dataset[name], down)));
      });
    }
  }

  // Large view of a sample, with the arrow keys going through the visible ones.
  const dialog = document.getElementById("detail");
  if (dialog) {
    const body = document.getElementById("detail-body");
    let samples = [];
    let at = 0;
    const show = (index) => {
      at = (index + samples.length) % samples.length;
      const sample = samples[at];
      const image = sample.querySelector(".open > *").cloneNode(true);
      if (image.tagName === "IMG") image.className = "open-image";
      const words = sample.querySelector(".words").cloneNode(true);
      const short = words.querySelector(":scope > .numbers");
      const more = words.querySelector(".more");
      more.hidden = false;
      short.replaceWith(more);
      body.replaceChildren(image, words);
      const neighbors = sample.querySelector(".neighbors");
      if (neighbors) body.append(neighbors.cloneNode(true));
      document.getElementById("position").textContent = `${at + 1} of ${samples.length}`;
    };
    for (const open of all(".sample .open")) {
      open.addEventListener("click", () => {
        const sample = open.closest(".sample");
        samples = [...sample.parentElement.children].filter((other) => !other.hidden);
        show(samples.indexOf(sample));
        dialog.showModal();
      });
    }
    document.getElementById("previous").addEventListener("click", () => show(at - 1));
    document.getElementById("next").addEventListener("click", () => show(at + 1));
    document.getElementById("close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") show(at - 1);
      if (event.key === "ArrowRight") show(at + 1);
    });
    dialog.addEventListener("close", () => samples[at].querySelector(".open").focus());
  }
})();
