package config

import (
	"encoding"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

var (
	duplicateMessage = regexp.MustCompile(`^mapping key "(.*)" already defined at \[(\d+):\d+\]$`)
	variable         = regexp.MustCompile(`\$?\$\{[^}]*\}?`)
	variableName     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

// decoder fills a value and collects the mistakes.
type decoder struct {
	src  Source
	errs []error
}

func (d *decoder) decode(root ast.Node, into any) {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		panic("config: Decode needs a pointer")
	}
	if root != nil {
		d.value(root, v.Elem(), "configuration", "")
	}
}

func (d *decoder) fail(n ast.Node, format string, args ...any) {
	d.failAt(position(n), format, args...)
}

func (d *decoder) failAt(p place, format string, args ...any) {
	if len(d.errs) < maxErrors {
		d.errs = append(d.errs, d.src.errorAt(p, fmt.Sprintf(format, args...)))
	}
}

// value decodes a node into v. what names the value for errors; tag is that of
// the struct field it belongs to.
func (d *decoder) value(n ast.Node, v reflect.Value, what string, tag reflect.StructTag) {
	if isNull(n) {
		d.null(n, v, what)
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.value(n, v.Elem(), what, tag)
		return
	}
	if isText(v) {
		text, ok := scalarText(n)
		if !ok {
			d.fail(n, "%s must be a single value, not %s", what, kindOf(n))
			return
		}
		d.scalar(position(n), text, v, what, tag)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.structure(n, v, what)
	case reflect.Slice:
		d.list(n, v, what, tag)
	case reflect.Map:
		d.mapping(n, v, what, tag)
	case reflect.String:
		switch s := n.(type) {
		case *ast.StringNode:
			d.scalar(position(n), s.Value, v, what, tag)
		case *ast.LiteralNode:
			d.scalar(position(n), s.Value.Value, v, what, tag)
		default:
			if text, ok := scalarText(n); ok {
				d.fail(n, "%s must be text, not %s; quote it: %q", what, kindOf(n), text)
				return
			}
			d.fail(n, "%s must be text, not %s", what, kindOf(n))
		}
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			d.fail(n, "%s must be true or false, not %s", what, describe(n))
			return
		}
		v.SetBool(b.Value)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		i, ok := n.(*ast.IntegerNode)
		if !ok {
			d.fail(n, "%s must be a whole number, not %s", what, describe(n))
			return
		}
		d.integer(position(n), i.Value, v, what)
	case reflect.Float32, reflect.Float64:
		switch f := n.(type) {
		case *ast.FloatNode:
			v.SetFloat(f.Value)
		case *ast.IntegerNode:
			switch i := f.Value.(type) {
			case int64:
				v.SetFloat(float64(i))
			case uint64:
				v.SetFloat(float64(i))
			}
		default:
			d.fail(n, "%s must be a number, not %s", what, describe(n))
		}
	default:
		panic("config: a field has the type " + v.Type().String() + ", which is not supported")
	}
}

// null handles a key without a value. A section whose keys are all commented
// out is empty; anything else was forgotten.
func (d *decoder) null(n ast.Node, v reflect.Value, what string) {
	switch {
	case isText(v):
	case v.Kind() == reflect.Struct:
		return
	case v.Kind() == reflect.Pointer && v.Type().Elem().Kind() == reflect.Struct && !isText(v.Elem()):
		d.fail(n, "%s has no value; write {} after the colon to take its defaults, or remove it", what)
		return
	}
	d.fail(n, "%s has no value; give one, or remove it", what)
}

func (d *decoder) structure(n ast.Node, v reflect.Value, what string) {
	m, ok := n.(*ast.MappingNode)
	if !ok {
		d.fail(n, "%s must be a mapping of keys to values, not %s", what, describe(n))
		return
	}
	fields := fieldsOf(v.Type())
	for _, kv := range m.Values {
		key, ok := keyText(kv.Key)
		if !ok {
			d.fail(kv.Key, "a key must be text, not %s", kindOf(kv.Key))
			continue
		}
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == key })
		if i < 0 {
			d.fail(kv.Key, "%s", unknownKey(key, names(fields)))
			continue
		}
		d.value(kv.Value, fieldByIndex(v, fields[i].index), "`"+key+"`", fields[i].tag)
	}
}

func (d *decoder) list(n ast.Node, v reflect.Value, what string, tag reflect.StructTag) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		d.fail(n, "%s must be a list, not %s", what, describe(n))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(s.Values), len(s.Values))
	for i, item := range s.Values {
		d.value(item, out.Index(i), fmt.Sprintf("item %d of %s", i+1, what), tag)
	}
	v.Set(out)
}

func (d *decoder) mapping(n ast.Node, v reflect.Value, what string, tag reflect.StructTag) {
	m, ok := n.(*ast.MappingNode)
	if !ok {
		d.fail(n, "%s must be a mapping of keys to values, not %s", what, describe(n))
		return
	}
	if v.IsNil() {
		v.Set(reflect.MakeMap(v.Type()))
	}
	for _, kv := range m.Values {
		key, ok := keyText(kv.Key)
		if !ok {
			d.fail(kv.Key, "a key must be text, not %s; quote it", kindOf(kv.Key))
			continue
		}
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(kv.Value, item, "`"+key+"`", tag)
		v.SetMapIndex(reflect.ValueOf(key).Convert(v.Type().Key()), item)
	}
}

func (d *decoder) integer(p place, value any, v reflect.Value, what string) {
	overflow := true
	if v.CanInt() {
		if i, ok := value.(int64); ok && !v.OverflowInt(i) {
			v.SetInt(i)
			overflow = false
		} else if u, ok := value.(uint64); ok && u <= 1<<63-1 && !v.OverflowInt(int64(u)) {
			v.SetInt(int64(u))
			overflow = false
		}
	} else {
		if u, ok := value.(uint64); ok && !v.OverflowUint(u) {
			v.SetUint(u)
			overflow = false
		} else if i, ok := value.(int64); ok && i >= 0 && !v.OverflowUint(uint64(i)) {
			v.SetUint(uint64(i))
			overflow = false
		}
	}
	if overflow {
		bits := v.Type().Bits()
		if v.CanInt() {
			d.failAt(p, "%s must lie between %d and %d", what, -1<<(bits-1), 1<<(bits-1)-1)
		} else {
			d.failAt(p, "%s must lie between 0 and %d", what, uint64(1)<<(bits-1)-1+uint64(1)<<(bits-1))
		}
	}
}

// scalar decodes text into a string, or into a type that reads text itself.
func (d *decoder) scalar(p place, text string, v reflect.Value, what string, tag reflect.StructTag) {
	if tag.Get("env") == "expand" {
		expanded, err := expand(text)
		if err != nil {
			d.failAt(p, "%s: %v", what, err)
			return
		}
		text = expanded
	}
	if allowed := tag.Get("oneof"); allowed != "" {
		values := strings.Split(allowed, ",")
		if !slices.Contains(values, text) {
			d.failAt(p, "%s cannot be %q; %s", what, text, choose(text, values))
			return
		}
	}
	if isText(v) {
		if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(text)); err != nil {
			d.failAt(p, "%s: %v", what, err)
		}
		return
	}
	v.SetString(text)
}

// set applies one override.
func (d *decoder) set(s Setting, into any) {
	v := reflect.ValueOf(into).Elem()
	var tag reflect.StructTag
	for part := range strings.SplitSeq(s.Path, ".") {
		if v.Kind() == reflect.Pointer {
			if v.IsNil() {
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
		if v.Kind() != reflect.Struct {
			d.errs = append(d.errs, &Error{Name: s.From, Message: fmt.Sprintf("there is no key `%s`", s.Path)})
			return
		}
		fields := fieldsOf(v.Type())
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == part })
		if i < 0 {
			d.errs = append(d.errs, &Error{Name: s.From, Message: unknownKey(part, names(fields))})
			return
		}
		v, tag = fieldByIndex(v, fields[i].index), fields[i].tag
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		v = v.Elem()
	}
	// Variables are left alone: the shell has expanded what it should.
	tag = reflect.StructTag(fmt.Sprintf("oneof:%q", tag.Get("oneof")))
	at := &decoder{src: Source{Name: s.From}}
	at.text(s.Value, v, tag)
	d.errs = append(d.errs, at.errs...)
}

// text decodes the value of a setting, which has no YAML type.
func (d *decoder) text(text string, v reflect.Value, tag reflect.StructTag) {
	const what = "value"
	switch {
	case isText(v), v.Kind() == reflect.String:
		d.scalar(place{}, text, v, what, tag)
	case v.Kind() == reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			d.failAt(place{}, "value must be true or false, not %q", text)
			return
		}
		v.SetBool(b)
	case v.CanInt():
		i, err := strconv.ParseInt(text, 0, 64)
		if err != nil {
			d.failAt(place{}, "value must be a whole number, not %q", text)
			return
		}
		d.integer(place{}, i, v, what)
	case v.CanUint():
		u, err := strconv.ParseUint(text, 0, 64)
		if err != nil {
			d.failAt(place{}, "value must be a whole number from 0, not %q", text)
			return
		}
		d.integer(place{}, u, v, what)
	case v.CanFloat():
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			d.failAt(place{}, "value must be a number, not %q", text)
			return
		}
		v.SetFloat(f)
	case v.Kind() == reflect.Slice:
		var parts []string
		if text != "" {
			parts = strings.Split(text, ",")
		}
		out := reflect.MakeSlice(v.Type(), len(parts), len(parts))
		for i, part := range parts {
			d.text(part, out.Index(i), tag)
		}
		v.Set(out)
	default:
		d.failAt(place{}, "this can only be set in a file")
	}
}

// expand replaces ${VAR} from the environment.
func expand(text string) (string, error) {
	var failed error
	out := variable.ReplaceAllStringFunc(text, func(m string) string {
		if strings.HasPrefix(m, "$$") {
			return m[1:]
		}
		name, closed := strings.CutSuffix(m[2:], "}")
		if !closed || !variableName.MatchString(name) {
			failed = fmt.Errorf("%q is no variable; write ${NAME}, or $${ for a plain ${", m)
			return m
		}
		value, ok := os.LookupEnv(name)
		if !ok {
			failed = fmt.Errorf("environment variable %s is not set", name)
		}
		return value
	})
	return out, failed
}

// field is one key that a struct has.
type field struct {
	name  string
	index []int
	tag   reflect.StructTag
}

func fieldsOf(t reflect.Type) []field {
	var out []field
	for i := range t.NumField() {
		f := t.Field(i)
		name, option, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case option == "inline" && f.Type.Kind() == reflect.Struct:
			for _, in := range fieldsOf(f.Type) {
				in.index = append([]int{i}, in.index...)
				out = append(out, in)
			}
		case name != "" && name != "-" && f.IsExported():
			out = append(out, field{name, []int{i}, f.Tag})
		}
	}
	return out
}

func fieldByIndex(v reflect.Value, index []int) reflect.Value {
	for _, i := range index {
		v = v.Field(i)
	}
	return v
}

func names(fields []field) []string {
	out := make([]string, len(fields))
	for i, f := range fields {
		out[i] = f.name
	}
	return out
}

// isText reports whether a value's type reads text itself.
func isText(v reflect.Value) bool {
	return v.IsValid() && reflect.PointerTo(v.Type()).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

func isNull(n ast.Node) bool {
	_, ok := n.(*ast.NullNode)
	return ok
}

func keyText(n ast.Node) (string, bool) {
	s, ok := n.(*ast.StringNode)
	if !ok {
		return "", false
	}
	return s.Value, true
}

// scalarText returns a scalar as it is written, without quotes.
func scalarText(n ast.Node) (string, bool) {
	switch s := n.(type) {
	case *ast.StringNode:
		return s.Value, true
	case *ast.LiteralNode:
		return s.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// kindOf names the kind of a node, for errors.
func kindOf(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.StringNode, *ast.LiteralNode:
		return "text"
	}
	return "nothing"
}

// describe is the value itself where it is short, else its kind.
func describe(n ast.Node) string {
	const longest = 40 // bytes
	if text, ok := scalarText(n); ok && len(text) <= longest {
		return strconv.Quote(text)
	}
	return kindOf(n)
}
