// The notebook: anywidget's protocol.

export default {
  render({ model, el }) {
    const dark = { true: false, false: true }[document.body.dataset.jpThemeLight] ?? null; // else as the system
    const viewer = show(el, model.get("data"), {
      dark,
      onselect: (name) => {
        model.set("selected", name);
        model.save_changes();
      },
    });
    const follow = () => viewer.select(model.get("selected"));
    model.on("change:selected", follow);
    return () => {
      model.off("change:selected", follow);
      viewer.destroy();
    };
  },
};
