package strcmd

import "strconv"

// fault is an error reply without its frame: the code, a space, the text. Empty is no fault.
type fault string

const (
	faultUnknown      fault = "ERR unknown command"
	faultWrongType    fault = "WRONGTYPE Operation against a key holding the wrong kind of value"
	faultSyntax       fault = "ERR syntax error"
	faultNotInteger   fault = "ERR value is not an integer or out of range"
	faultNotFloat     fault = "ERR value is not a valid float"
	faultOverflow     fault = "ERR increment or decrement would overflow"
	faultDecrOverflow fault = "ERR decrement would overflow"
	faultNotFinite    fault = "ERR increment would produce NaN or Infinity"
	faultTooLong      fault = "ERR string exceeds maximum allowed size (proto-max-bulk-len)"
	faultExpireNX     fault = "ERR NX and XX, GT or LT options at the same time are not compatible"
	faultExpireGTLT   fault = "ERR GT and LT options at the same time are not compatible"
)

func (c *call) faultExpireTime() fault {
	return fault("ERR invalid expire time in '" + c.cmd.name + "' command")
}

func appendError(dst []byte, f fault) []byte {
	dst = append(dst, '-')
	dst = append(dst, f...)
	return append(dst, "\r\n"...)
}

func appendSimple(dst []byte, word string) []byte {
	dst = append(dst, '+')
	dst = append(dst, word...)
	return append(dst, "\r\n"...)
}

func appendInt(dst []byte, n int64) []byte {
	dst = append(dst, ':')
	dst = strconv.AppendInt(dst, n, 10)
	return append(dst, "\r\n"...)
}

func appendBulk(dst, b []byte) []byte {
	dst = append(dst, '$')
	dst = strconv.AppendInt(dst, int64(len(b)), 10)
	dst = append(dst, "\r\n"...)
	dst = append(dst, b...)
	return append(dst, "\r\n"...)
}

func appendArray(dst []byte, n int) []byte {
	dst = append(dst, '*')
	dst = strconv.AppendInt(dst, int64(n), 10)
	return append(dst, "\r\n"...)
}

func appendNull(dst []byte, proto int) []byte {
	if proto == 3 {
		return append(dst, "_\r\n"...)
	}
	return append(dst, "$-1\r\n"...)
}
