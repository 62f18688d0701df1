package main

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

// object is a JSON object.
type object = map[string]any

// schema returns the JSON Schema (draft 2020-12) of a program's configuration
// file. It refuses every file that has an unknown key or a value of the wrong
// form. What needs more than one key or another file to be seen is left to
// "validate".
func schema(program string, root *key) ([]byte, error) {
	s, err := root.section()
	if err != nil {
		return nil, err
	}
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "Configuration of the Hallmark " + program
	s["description"] = root.about
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err = e.Encode(s)
	return b.Bytes(), err
}

// section is the schema of a mapping.
func (k *key) section() (object, error) {
	properties := object{}
	var choices []any
	for _, child := range k.keys {
		s, err := child.schema()
		if err != nil {
			return nil, err
		}
		properties[child.name] = s
		choices = append(choices, object{"type": "object", "required": []string{child.name}})
	}
	s := object{"type": "object", "properties": properties, "additionalProperties": false}
	if !k.optional {
		s["type"] = []string{"object", "null"} // null has all its keys commented out
	}
	if k.oneOf {
		if !k.optional {
			choices = append(choices, object{"maxProperties": 0}) // the default
		}
		s["oneOf"] = choices
	}
	return s, nil
}

func (k *key) schema() (object, error) {
	s, err := k.value(k.typ)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.path, err)
	}
	s["description"] = k.meaning
	if k.standard == "" || k.prose {
		return s, nil
	}
	switch s["type"] {
	case "integer":
		s["default"], err = strconv.ParseInt(k.standard, 10, 64)
	case "number":
		s["default"], err = strconv.ParseFloat(k.standard, 64)
	case "boolean":
		s["default"], err = strconv.ParseBool(k.standard)
	case "string":
		s["default"] = k.standard
	default:
		err = fmt.Errorf("write the default of a list or a section in words: \"Default: …\"")
	}
	if err != nil {
		return nil, fmt.Errorf("default of %s: %w", k.path, err)
	}
	return s, nil
}

// value is the schema of a value of a type.
func (k *key) value(t reflect.Type) (object, error) {
	if readsText(t) {
		return k.text(t), nil
	}
	switch t.Kind() {
	case reflect.Struct:
		return k.section()
	case reflect.Slice:
		items, err := k.value(t.Elem())
		return object{"type": "array", "items": items}, err
	case reflect.Map:
		values, err := k.value(t.Elem())
		return object{"type": "object", "additionalProperties": values}, err
	case reflect.String:
		return k.text(t), nil
	case reflect.Bool:
		return object{"type": "boolean"}, nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return object{"type": "integer"}, nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return object{"type": "integer", "minimum": 0}, nil
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}, nil
	}
	return nil, fmt.Errorf("no schema for a %s", t)
}

// text is the schema of a string. A type that reads text may say how that is
// written: Choices are the only ones, Pattern is a regular expression.
func (k *key) text(t reflect.Type) object {
	s := object{"type": "string"}
	v := reflect.New(t).Interface()
	if choices := k.choices(t); choices != nil {
		s["enum"] = choices
	} else if p, ok := v.(interface{ Pattern() string }); ok {
		s["pattern"] = p.Pattern()
	}
	if k.tag.Get("env") != "expand" || len(s) == 1 {
		return s
	}
	return object{"type": "string", "anyOf": []any{s, object{"pattern": `[$][{]`}}}
}

// choices returns the only values that a string may have, or nil.
func (k *key) choices(t reflect.Type) []string {
	if allowed := k.tag.Get("oneof"); allowed != "" {
		return strings.Split(allowed, ",")
	}
	if c, ok := reflect.New(t).Interface().(interface{ Choices() []string }); ok {
		return c.Choices()
	}
	return nil
}

// readsText reports whether a type reads text itself.
func readsText(t reflect.Type) bool {
	return reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}
