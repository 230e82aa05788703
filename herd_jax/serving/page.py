"""The page at /: a dialog with the model in a browser, with its settings and its speed. It loads nothing from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; height: 100vh; display: flex; flex-direction: column; }
header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; padding: .5rem 1rem; border-bottom: 1px solid var(--line); }
header h1 { font-size: 1rem; margin: 0; }
details { padding: .25rem 1rem; border-bottom: 1px solid var(--line); }
fieldset { border: 0; padding: .5rem 0; margin: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .5rem 1rem; }
label { display: flex; flex-direction: column; font-size: .85rem; }
label.wide { grid-column: 1 / -1; }
input, select, textarea, button { font: inherit; padding: .35rem .5rem; border: 1px solid var(--line); border-radius: .4rem; }
#dialog { flex: 1; overflow-y: auto; padding: 1rem; max-width: 52rem; width: 100%; margin: 0 auto; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .8rem; margin: .4rem 0; border-radius: .6rem; }
.user { background: var(--soft); margin-left: 15%; }
.error { border: 1px solid #c33; }
.speed { font-size: .8rem; opacity: .7; margin: 0 .8rem; }
form { display: flex; gap: .5rem; padding: .75rem 1rem; max-width: 52rem; width: 100%; margin: 0 auto; }
form textarea { flex: 1; resize: none; }
"""

SCRIPT = """
const at = id => document.getElementById(id);
const messages = [];
let running = null;

function headers() {
  const key = at('key').value.trim();
  return Object.assign({'Content-Type': 'application/json'}, key ? {Authorization: 'Bearer ' + key} : {});
}

async function listModels() {
  const answer = await fetch('/v1/models', {headers: headers()});
  const body = await answer.json();
  if (!answer.ok) { at('state').textContent = body.error.message; return; }
  at('model').replaceChildren(...body.data.map(model => new Option(model.id, model.id)));
  at('state').textContent = '';
}

function show(role, text) {
  const box = document.createElement('div');
  box.className = 'message ' + role;
  box.textContent = text;
  at('dialog').append(box);
  at('dialog').scrollTop = at('dialog').scrollHeight;
  return box;
}

function settings() {
  const found = {};
  for (const name of ['temperature', 'top_p', 'top_k', 'min_p', 'max_tokens', 'seed', 'repetition_penalty']) {
    const value = at(name).value.trim();
    if (value !== '') found[name] = Number(value);
  }
  return found;
}

async function answer() {
  const system = at('system').value.trim();
  const dialog = (system ? [{role: 'system', content: system}] : []).concat(messages);
  const box = show('assistant', '');
  const speed = document.createElement('div');
  speed.className = 'speed';
  at('dialog').append(speed);
  running = new AbortController();
  at('send').textContent = 'Stop';
  let text = '', first = null, usage = null;
  const begun = performance.now();
  try {
    const body = {model: at('model').value, messages: dialog, stream: true, stream_options: {include_usage: true}, ...settings()};
    const reply = await fetch('/v1/chat/completions', {method: 'POST', headers: headers(), body: JSON.stringify(body), signal: running.signal});
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split('\\n');
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith('data: ') || line === 'data: [DONE]') continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        if (event.usage) usage = event.usage;
        const delta = event.choices.length ? event.choices[0].delta.content || '' : '';
        if (delta && first === null) first = performance.now();
        text += delta;
        box.textContent = text;
        at('dialog').scrollTop = at('dialog').scrollHeight;
      }
    }
  } catch (error) {
    if (error.name !== 'AbortError') { show('error', error.message); }
  }
  const seconds = (performance.now() - begun) / 1000;
  if (usage) {
    speed.textContent = (usage.completion_tokens / seconds).toFixed(1) + ' tokens/s, ' + usage.completion_tokens + ' tokens, first after '
      + ((first ?? begun) / 1000 - begun / 1000).toFixed(2) + ' s';
  }
  if (text) messages.push({role: 'assistant', content: text});
  running = null;
  at('send').textContent = 'Send';
}

at('ask').addEventListener('submit', event => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = at('question').value.trim();
  if (!text) return;
  at('question').value = '';
  messages.push({role: 'user', content: text});
  show('user', text);
  answer();
});
at('question').addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey) { event.preventDefault(); at('ask').requestSubmit(); }
});
at('clear').addEventListener('click', () => { if (running) running.abort(); messages.length = 0; at('dialog').replaceChildren(); });
at('key').addEventListener('change', listModels);
listModels();
"""


def _field(name: str, text: str, value: str = "", least: str = "", most: str = "", step: str = "any") -> str:
    bounds = (f' min="{least}"' if least else "") + (f' max="{most}"' if most else "")
    return f'<label>{text}<input id="{name}" type="number" step="{step}" value="{value}"{bounds}></label>'


FIELDS = "".join(
    [
        _field("temperature", "Temperature", "0.7", "0", "2"), _field("top_p", "Top-p", "0.95", "0", "1"), _field("top_k", "Top-k", "", "0", step="1"),
        _field("min_p", "Min-p", "", "0", "1"), _field("repetition_penalty", "Repetition penalty", "", "0"),
        _field("max_tokens", "Most tokens", "512", "1", step="1"), _field("seed", "Seed", "", step="1"),
    ]
)  # fmt: skip

PAGE = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>herd_jax</title>
<style>{STYLE}</style></head><body>
<header><h1>herd_jax</h1><select id="model" aria-label="Model"></select><button id="clear" type="button">New dialog</button><span id="state" role="status"></span></header>
<details><summary>Settings</summary><fieldset>{FIELDS}
<label>API key<input id="key" type="password" autocomplete="off"></label>
<label class="wide">System message<textarea id="system" rows="2"></textarea></label></fieldset></details>
<main id="dialog" aria-live="polite"></main>
<form id="ask"><textarea id="question" rows="2" placeholder="Ask something" aria-label="Question"></textarea><button id="send">Send</button></form>
<script>{SCRIPT}</script></body></html>
"""
