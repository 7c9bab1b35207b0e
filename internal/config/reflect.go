package config

import (
	"iter"
	"reflect"
	"strings"
)

// setting is one leaf of the Config: a value that a key of the file sets.
type setting struct {
	field reflect.StructField
	value reflect.Value
	// hot: a running proxy takes a new value over.
	hot bool
}

// settings yields every setting of a struct under its key path, in the order of declaration. A list
// is one setting.
func settings(v reflect.Value) iter.Seq2[string, setting] {
	return func(yield func(string, setting) bool) {
		walk(v, "", false, yield)
	}
}

func walk(v reflect.Value, path string, hot bool, yield func(string, setting) bool) bool {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		at, fieldHot := join(path, keyOf(f)), hot || f.Tag.Get("reload") == "hot"
		if keyOf(f) == "" {
			at = path
		}
		if f.Type.Kind() == reflect.Struct {
			if !walk(v.Field(i), at, fieldHot, yield) {
				return false
			}
		} else if !yield(at, setting{f, v.Field(i), fieldHot}) {
			return false
		}
	}
	return true
}

// keyOf is the key of a field; "" for an inlined struct, whose keys stand among its parent's.
func keyOf(f reflect.StructField) string {
	key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	return key
}

// fieldsOf are a struct's fields by key, with the index path from the struct.
func fieldsOf(t reflect.Type) map[string]reflect.StructField {
	fields := map[string]reflect.StructField{}
	for _, f := range reflect.VisibleFields(t) {
		if key := keyOf(f); key != "" {
			fields[key] = f
		}
	}
	return fields
}
