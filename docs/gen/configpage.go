package main

import (
	"bytes"
	"fmt"
	"reflect"
	"regexp"
	"strings"
)

const configHead = `# Configuration of the %[1]s

<!-- Made by "make generate" from the comments of %[1]s.Config. -->

%[2]s

The file is YAML: ` + "`hallmark %[1]s run -c FILE`, by default `/etc/hallmark/%[1]s.yaml`" + `.
An unknown key or an impossible value is an error that names file, line and the
nearest key; ` + "`hallmark %[1]s validate -c FILE`" + ` finds them without starting
anything. Durations are written like 90s, 1h30m or 30d. ` + "`${NAME}`" + ` is replaced from
the environment in keys that say so (env); ` + "`$${`" + ` is a plain ` + "`${`" + `. A flag
` + "`--set KEY=VALUE`" + ` overrides the file. Editors that know JSON Schema complete and
check the file if its first line is
` + "`# yaml-language-server: $schema=%[1]s.json`, with what `hallmark %[1]s schema`" + ` prints.
`

// configPage returns the reference of a program's configuration.
func configPage(program string, root *key) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, configHead, program, root.about)
	root.tables(&b)
	return b.Bytes()
}

// tables writes a table of the keys of a section, then those of the sections in
// it.
func (k *key) tables(b *bytes.Buffer) {
	if k.path != "" {
		fmt.Fprintf(b, "\n## %s\n\n%s\n", k.path, k.about)
	}
	if len(k.keys) == 0 {
		return
	}
	b.WriteString("\n| key | type | default | meaning |\n|---|---|---|---|\n")
	for _, child := range k.keys {
		standard := cellText(child.standard)
		if child.standard != "" && !child.prose {
			standard = "`" + child.standard + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", child.name, child.form(child.typ), standard, cellText(child.meaning))
	}
	for _, child := range k.keys {
		if child.about != "" {
			child.tables(b)
		}
	}
}

// form says in words how a value is written.
func (k *key) form(t reflect.Type) string {
	var out string
	switch {
	case k.choices(t) != nil:
		out = "`" + strings.Join(k.choices(t), "`, `") + "`"
	case readsText(t):
		out = strings.ToLower(t.Name())
	default:
		switch t.Kind() {
		case reflect.Struct:
			return "[section](#" + strings.ReplaceAll(k.path, ".", "") + ")"
		case reflect.Slice:
			return "list of " + k.form(t.Elem())
		case reflect.Map:
			return "map to " + k.form(t.Elem())
		case reflect.String:
			out = "text"
		case reflect.Bool:
			out = "true or false"
		case reflect.Float32, reflect.Float64:
			out = "number"
		default:
			out = "whole number"
		}
	}
	if k.tag.Get("env") == "expand" {
		out += ", env"
	}
	return out
}

// template is one of text/template, which Markdown should not interpret.
var template = regexp.MustCompile(`\{\{.*?\}\}(/\{\{.*?\}\})*`)

// cellText is text as a cell of a table has it.
func cellText(text string) string {
	text = strings.NewReplacer("|", `\|`, "\n\n", "<br>", "<", "&lt;").Replace(text)
	return template.ReplaceAllString(text, "`$0`")
}
