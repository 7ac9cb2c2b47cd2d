-- Wireshark dissector of NECP, the Network Element Control Protocol (draft-cerpa-necp-02), TCP port 3262.
-- Install: copy it to the directory that `tshark -G folders` calls "Personal Lua Plugins", or name it on the command
-- line: `tshark -X lua_script:necp.lua`. Other ports: Decode As, or `-d tcp.port==PORT,necp`.
-- A credential is shown as bytes: whether it is right is for the reader to compute, who has the key.

local necp = Proto("necp", "Network Element Control Protocol")

local HEADER, UNIT, CREDENTIAL = 20, 32, 20
-- The extension for exceptions of IPv6: a variable-length payload (§5.2.3.2), asked for in KEEPALIVE.
local PREAMBLE, WIDE_UNIT, MAGIC, EXTENSION = 8, 64, 0x45584336, 0x45580006
local BASIC, AUTH, ERROR, MISMATCH, AUTH_REQUIRED, BAD_SEQUENCE = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

local opcodes = {
    [0x00] = "NOOP", [0x01] = "INIT", [0x02] = "INIT_ACK", [0x03] = "KEEPALIVE", [0x04] = "KEEPALIVE_ACK",
    [0x05] = "START", [0x06] = "START_ACK", [0x07] = "STOP", [0x08] = "STOP_ACK",
    [0x20] = "EXCEPTION_ADD", [0x21] = "EXCEPTION_ADD_ACK", [0x22] = "EXCEPTION_DEL", [0x23] = "EXCEPTION_DEL_ACK",
    [0x24] = "EXCEPTION_RESET", [0x25] = "EXCEPTION_RESET_ACK", [0x26] = "EXCEPTION_QUERY", [0x27] = "EXCEPTION_RESP",
}
-- The opcode of the answer to each request (§5.3).
local answers = { [0x01] = 0x02, [0x03] = 0x04, [0x05] = 0x06, [0x07] = 0x08,
                  [0x20] = 0x21, [0x22] = 0x23, [0x24] = 0x25, [0x26] = 0x27 }
local requests = {}
for request, answer in pairs(answers) do requests[answer] = request end

local forwardings = { [1] = "l2", [2] = "gre", [3] = "l3" }
local scopes = { [0] = "local", [1] = "local", [2] = "global" }
local protocols = { [6] = "tcp", [17] = "udp" }

local f = {
    identifier = ProtoField.uint16("necp.identifier", "Protocol identifier", base.HEX),
    flags = ProtoField.uint16("necp.flags", "Flags", base.HEX),
    basic = ProtoField.bool("necp.flags.basic_payload", "Basic payload", 16, nil, BASIC),
    auth = ProtoField.bool("necp.flags.auth_credential_provided", "Credential provided", 16, nil, AUTH),
    error = ProtoField.bool("necp.flags.error", "Error", 16, nil, ERROR),
    mismatch = ProtoField.bool("necp.flags.protocol_version_mismatch", "Protocol version mismatch", 16, nil, MISMATCH),
    auth_required = ProtoField.bool("necp.flags.auth_required", "Authentication required", 16, nil, AUTH_REQUIRED),
    bad_sequence = ProtoField.bool("necp.flags.bad_sequence_number", "Bad sequence number", 16, nil, BAD_SEQUENCE),
    reserved = ProtoField.uint16("necp.flags.reserved", "Reserved", base.HEX, nil, 0xffc0),
    version = ProtoField.uint8("necp.version", "Version"),
    opcode = ProtoField.uint8("necp.opcode", "Opcode", base.HEX, opcodes),
    request_id = ProtoField.uint16("necp.request_id", "Request identifier"),
    seq_num = ProtoField.uint64("necp.seq_num", "Sequence number", base.HEX),
    payload_len = ProtoField.uint32("necp.payload_len", "Payload length"),
    summary = ProtoField.string("necp.summary", "Message"),
    unit = ProtoField.string("necp.unit", "Unit"),
    data = ProtoField.bytes("necp.data", "Payload"),
    credential = ProtoField.bytes("necp.credential", "Credential (HMAC-SHA1)"),
    authenticate = ProtoField.bool("necp.init.authenticate", "Authenticate every message", 32, nil, 0x1),
    first = ProtoField.uint64("necp.init.first_seq_num", "First sequence number to receive", base.HEX),
    query_type = ProtoField.uint32("necp.query_type", "Performance query type", base.DEC, { [1] = "Health Index", [EXTENSION] = "Extension for IPv6" }),
    health = ProtoField.uint32("necp.health", "Health Index"),
    forwarding = ProtoField.uint32("necp.forwarding", "Forwarding type", base.DEC,
        { [1] = "Layer 2", [2] = "GRE", [3] = "Layer 3" }),
    protocol = ProtoField.uint32("necp.protocol", "IP protocol", base.DEC, { [6] = "TCP", [17] = "UDP" }),
    port = ProtoField.uint32("necp.port", "Destination port"),
    scope = ProtoField.uint32("necp.scope", "Scope", base.DEC, { [0] = "None", [1] = "Local", [2] = "Global" }),
    ttl = ProtoField.uint32("necp.ttl", "Time to live (s)"),
    preamble = ProtoField.string("necp.preamble", "Preamble"),
    magic = ProtoField.uint32("necp.preamble.magic", "Extension", base.HEX, { [MAGIC] = "Exceptions of IPv6" }),
    extension = ProtoField.uint32("necp.extension_version", "Version of the extension"),
    wide_version = ProtoField.uint8("necp.preamble.version", "Version"),
    unit_len = ProtoField.uint8("necp.preamble.unit_len", "Bytes of each unit"),
    family = ProtoField.uint8("necp.family", "Family", base.DEC, { [0] = "Any", [4] = "IPv4", [6] = "IPv6" }),
    installer6 = ProtoField.ipv6("necp.installer6", "Installer"),
    source6 = ProtoField.ipv6("necp.source6", "Source address"),
    destination6 = ProtoField.ipv6("necp.destination6", "Destination address"),
    installer = ProtoField.ipv4("necp.installer", "Installer"),
    source = ProtoField.ipv4("necp.source", "Source address"),
    source_len = ProtoField.uint32("necp.source_prefix_len", "Source prefix length"),
    destination = ProtoField.ipv4("necp.destination", "Destination address"),
    destination_len = ProtoField.uint32("necp.destination_prefix_len", "Destination prefix length"),
    unused = ProtoField.bytes("necp.unused", "Unused"),
    response_in = ProtoField.framenum("necp.response_in", "Response in", base.NONE, frametype.RESPONSE),
    response_to = ProtoField.framenum("necp.response_to", "Response to", base.NONE, frametype.REQUEST),
    time = ProtoField.relative_time("necp.time", "Time since the request"),
}
necp.fields = f

local e = {
    error = ProtoExpert.new("necp.failed", "The request, or some of its units, failed", expert.group.RESPONSE_CODE,
        expert.severity.WARN),
    identifier = ProtoExpert.new("necp.bad_identifier", "A message must begin with 0x414a", expert.group.MALFORMED,
        expert.severity.ERROR),
    version = ProtoExpert.new("necp.bad_version", "Only version 1 is defined", expert.group.PROTOCOL,
        expert.severity.WARN),
    opcode = ProtoExpert.new("necp.reserved_opcode", "Reserved opcode", expert.group.UNDECODED, expert.severity.WARN),
    payload = ProtoExpert.new("necp.bad_payload", "The payload is not made of units of 32 bytes",
        expert.group.MALFORMED, expert.severity.ERROR),
    unit = ProtoExpert.new("necp.bad_unit", "A field is out of range", expert.group.PROTOCOL, expert.severity.ERROR),
}
necp.experts = { e.error, e.identifier, e.version, e.opcode, e.payload, e.unit }

local tcp_stream = Field.new("tcp.stream")

-- Requests by stream, sender, request id and opcode, in their order; and what was found by frame and offset, for
-- Wireshark dissects a frame more than once.
local open, matched = {}, {}
function necp.init() open, matched = {}, {} end

-- ---- what units mean: text, or nil and what is wrong ----

local function ip(word)
    return string.format("%d.%d.%d.%d", math.floor(word / 0x1000000), math.floor(word / 0x10000) % 256,
        math.floor(word / 0x100) % 256, word % 256)
end

local function has_ports(protocol) return protocol == 6 or protocol == 17 end

local function service(protocol, port)
    return has_ports(protocol) and string.format("%s/%d", protocols[protocol], port) or tostring(protocol)
end

-- Protocol and port, of which `least` is the smallest that is legal.
local function check_service(protocol, port, least)
    if protocol > 255 or protocol < least then return "IP protocol " .. protocol .. " is out of range" end
    if has_ports(protocol) and (port > 65535 or port < least) then return "port " .. port .. " is out of range" end
end

local function truncated(address, length)
    local size = 2 ^ (32 - length)
    return ip(address - address % size) .. "/" .. length
end

local function prefix(address, length)
    if address == 0 then return "any" end
    if length < 1 or length > 32 then return nil, "prefix length " .. length .. " is out of range" end
    return truncated(address, length)
end

local function flows(w)
    local protocol, port = w[6], w[7]
    if protocol > 255 then return nil, "IP protocol " .. protocol .. " is out of range" end
    if has_ports(protocol) and port > 65535 or protocol == 0 and port ~= 0 then
        return nil, "port " .. port .. " is out of range"
    end
    local source, wrong = prefix(w[2], w[3])
    if not source then return nil, wrong end
    local destination
    destination, wrong = prefix(w[4], w[5])
    if not destination then return nil, wrong end
    local kind = protocol == 0 and "any" or tostring(protocol)
    if has_ports(protocol) then
        kind = port == 0 and protocols[protocol] or service(protocol, port)
    end
    return source .. " -> " .. destination .. " " .. kind
end

local function scope_of(w)
    if not scopes[w[0]] then return nil, "unknown scope " .. w[0] end
    return scopes[w[0]]
end

local function filter_address(address, length)
    if address == 0 then return nil end
    if length > 32 then return nil, "prefix length " .. length .. " is out of range" end
    return length == 0 and ip(address) or truncated(address, length)
end

local function filter(w)
    local parts = {}
    if w[0] ~= 0 then
        local scope, wrong = scope_of(w)
        if not scope then return nil, wrong end
        parts[#parts + 1] = scope
    end
    if w[6] > 255 then return nil, "IP protocol " .. w[6] .. " is out of range" end
    if w[7] > 65535 then return nil, "port " .. w[7] .. " is out of range" end
    if w[1] ~= 0 then parts[#parts + 1] = "by " .. ip(w[1]) end
    for _, side in ipairs({ { "from ", w[2], w[3] }, { "to ", w[4], w[5] } }) do
        local address, wrong = filter_address(side[2], side[3])
        if wrong then return nil, wrong end
        if address then parts[#parts + 1] = side[1] .. address end
    end
    if w[6] ~= 0 then parts[#parts + 1] = "protocol " .. w[6] end
    if w[7] ~= 0 then parts[#parts + 1] = "port " .. w[7] end
    return #parts == 0 and "all" or table.concat(parts, " ")
end

local function number(high, low) return string.format("0x%08x%08x", high, low) end

local function query(w)
    if w[0] == EXTENSION and w[1] + w[2] == 0 then return "extension" end
    if w[0] ~= 1 then return nil, "unknown query type " .. w[0] end
    local wrong = check_service(w[1], w[2], 0)
    if wrong then return nil, wrong end
    return "health of " .. service(w[1], w[2])
end

local QUERY_FIELDS = { f.query_type, f.protocol, f.port }
local FLOW_FIELDS = { [3] = f.source, [4] = f.source_len, [5] = f.destination, [6] = f.destination_len,
    [7] = f.protocol, [8] = f.port }
local function exception_fields(first, second)
    local fields = { first, second }
    for at, field in pairs(FLOW_FIELDS) do fields[at] = field end
    return fields
end

-- By opcode: the fields of data0 to data7, and the text.
local layouts = {
    [0x01] = { { f.authenticate }, function(w)
        if w[0] > 1 then return nil, string.format("unknown bits in INIT: 0x%x", w[0]) end
        return w[0] == 0 and "no authentication" or "authenticate from " .. number(w[1], w[2])
    end, 4 },
    [0x02] = { {}, function(w) return "first number " .. number(w[0], w[1]) end, 0 },
    [0x03] = { QUERY_FIELDS, query },
    [0x04] = { { f.query_type, f.protocol, f.port, f.health }, function(w)
        local text, wrong = query(w)
        if not text then return nil, wrong end
        if text == "extension" then return "extension version " .. w[3] end
        if w[3] > 100 then return nil, "health index " .. w[3] .. " is above 100" end
        return text .. " is " .. w[3]
    end },
    [0x05] = { { f.forwarding, f.protocol, f.port }, function(w)
        if not forwardings[w[0]] then return nil, "unknown forwarding type " .. w[0] end
        local wrong = check_service(w[1], w[2], 1)
        if wrong then return nil, wrong end
        return forwardings[w[0]] .. " " .. service(w[1], w[2])
    end },
    [0x07] = { { f.forwarding, f.protocol, f.port }, function(w)
        local wrong = check_service(w[1], w[2], 1)
        if wrong then return nil, wrong end
        return service(w[1], w[2])
    end },
    [0x20] = { exception_fields(f.scope, f.ttl), function(w)
        local text, wrong = flows(w)
        if not text then return nil, wrong end
        local scope
        scope, wrong = scope_of(w)
        if not scope then return nil, wrong end
        -- Nobody may switch a whole farm off.
        if text == "any -> any any" then scope = "local" end
        return scope .. " ttl " .. w[1] .. " " .. text
    end },
    [0x22] = { exception_fields(f.scope, f.ttl), flows },
    [0x26] = { exception_fields(f.scope, f.installer), filter },
    [0x27] = { exception_fields(f.scope, f.installer), function(w)
        local scope, wrong = scope_of(w)
        if not scope then return nil, wrong end
        local text
        text, wrong = flows(w)
        if not text then return nil, wrong end
        return scope .. " by " .. ip(w[1]) .. " " .. text
    end },
}

-- ---- wide units ----

-- An address as 16 bytes: text, and its family; nil for 0.
local function address6(tvb)
    local high, low = tvb(0, 8), tvb(8, 8)
    if high:uint64() == UInt64(0) and low:uint64() == UInt64(0) then return nil end
    if high:uint64() == UInt64(0) and tvb(8, 4):uint() == 0xffff then return tostring(tvb(12, 4):ipv4()), 4 end
    return tostring(tvb:ipv6()), 6
end

-- An IPv6 address without its host bits, as text.
local function network6(tvb, length)
    local bytes = tvb:bytes()
    for at = 0, 15 do
        local bits = math.min(math.max(length - 8 * at, 0), 8)
        local size = 2 ^ (8 - bits)
        local byte = bytes:get_index(at)
        bytes:set_index(at, math.floor(byte - byte % size))
    end
    return tostring(bytes:tvb("Network")(0, 16):ipv6())
end

-- A prefix of this family, or of its own (0): text, or nil and what is wrong.
local function prefix6(tvb, length, family, bare)
    local text, own = address6(tvb)
    if not text then return bare and "" or "any" end
    if family ~= 0 and own ~= family then return nil, text .. " is of the other address family" end
    if bare and length == 0 then return text end
    if length < 1 or length > (own == 4 and 32 or 128) then return nil, "prefix length " .. length .. " is out of range" end
    if own == 4 then return truncated(tvb(12, 4):uint(), length) end
    return network6(tvb, length) .. "/" .. length
end

local function wide_flows(tvb)
    local family, protocol, port = tvb(1, 1):uint(), tvb(4, 1):uint(), tvb(6, 2):uint()
    if family ~= 4 and family ~= 6 then return nil, "family " .. family .. " is out of range" end
    if protocol == 0 and port ~= 0 then return nil, "port " .. port .. " is out of range" end
    local source, wrong = prefix6(tvb(16, 16), tvb(2, 1):uint(), family)
    if not source then return nil, wrong end
    local destination
    destination, wrong = prefix6(tvb(32, 16), tvb(3, 1):uint(), family)
    if not destination then return nil, wrong end
    if family == 6 and source == "any" and destination == "any" then source, destination = "::/0", "::/0" end
    local kind = protocol == 0 and "any" or tostring(protocol)
    if has_ports(protocol) then kind = port == 0 and protocols[protocol] or service(protocol, port) end
    return source .. " -> " .. destination .. " " .. kind
end

-- EXCEPTION_ADD and EXCEPTION_DEL: IPv4 has its own units.
local function wide_flows6(tvb)
    local family = tvb(1, 1):uint()
    if family ~= 6 then return nil, "family " .. family .. " is out of range" end
    return wide_flows(tvb)
end

local function wide_scope(tvb)
    local scope = tvb(0, 1):uint()
    if not scopes[scope] then return nil, "unknown scope " .. scope end
    return scopes[scope]
end

local function wide_filter(tvb)
    local parts, family = {}, tvb(1, 1):uint()
    if family ~= 0 and family ~= 4 and family ~= 6 then return nil, "family " .. family .. " is out of range" end
    if family ~= 0 then parts[1] = "IPv" .. family end
    if tvb(0, 1):uint() ~= 0 then
        local scope, wrong = wide_scope(tvb)
        if not scope then return nil, wrong end
        parts[#parts + 1] = scope
    end
    local installer = address6(tvb(48, 16))
    if installer then parts[#parts + 1] = "by " .. installer end
    for _, side in ipairs({ { "from ", 16, 2 }, { "to ", 32, 3 } }) do
        local address, wrong = prefix6(tvb(side[2], 16), tvb(side[3], 1):uint(), family, true)
        if not address then return nil, wrong end
        if address ~= "" then parts[#parts + 1] = side[1] .. address end
    end
    if tvb(4, 1):uint() ~= 0 then parts[#parts + 1] = "protocol " .. tvb(4, 1):uint() end
    if tvb(6, 2):uint() ~= 0 then parts[#parts + 1] = "port " .. tvb(6, 2):uint() end
    return #parts == 0 and "all" or table.concat(parts, " ")
end

local wide_layouts = {
    [0x20] = function(tvb)
        local text, wrong = wide_flows6(tvb)
        if not text then return nil, wrong end
        local scope
        scope, wrong = wide_scope(tvb)
        if not scope then return nil, wrong end
        -- Nobody may switch a whole farm off.
        if text == "::/0 -> ::/0 any" then scope = "local" end
        return scope .. " ttl " .. tvb(8, 4):uint() .. " " .. text
    end,
    [0x22] = wide_flows6,
    [0x26] = wide_filter,
    [0x27] = function(tvb)
        local scope, wrong = wide_scope(tvb)
        if not scope then return nil, wrong end
        local text
        text, wrong = wide_flows(tvb)
        if not text then return nil, wrong end
        return scope .. " by " .. (address6(tvb(48, 16)) or "::") .. " " .. text
    end,
}

local function dissect_wide_unit(tvb, tree, layout)
    local text, wrong
    if tvb(5, 1):uint() ~= 0 or tvb(12, 4):uint() ~= 0 then
        wrong = "reserved bytes are not 0"
    else
        text, wrong = layout(tvb)
    end
    local item = tree:add(f.unit, tvb, text or wrong)
    if wrong then item:add_proto_expert_info(e.unit, wrong) end
    item:add(f.scope, tvb(0, 1))
    item:add(f.family, tvb(1, 1))
    item:add(f.source_len, tvb(2, 1))
    item:add(f.destination_len, tvb(3, 1))
    item:add(f.protocol, tvb(4, 1))
    item:add(f.port, tvb(6, 2))
    item:add(f.ttl, tvb(8, 4))
    item:add(f.source6, tvb(16, 16))
    item:add(f.destination6, tvb(32, 16))
    item:add(f.installer6, tvb(48, 16))
end

-- The preamble; says whether it is one that is spoken.
local function dissect_preamble(tvb, tree)
    local magic, version, unit_len = tvb(0, 4):uint(), tvb(4, 1):uint(), tvb(5, 1):uint()
    local spoken = magic == MAGIC and version == 1 and unit_len == WIDE_UNIT and tvb(6, 2):uint() == 0
    local text = spoken and "EXC6 version 1"
        or string.format("preamble 0x%08x version %d units of %d is not spoken", magic, version, unit_len)
    local item = tree:add(f.preamble, tvb, text)
    if not spoken then item:add_proto_expert_info(e.unit, text) end
    item:add(f.magic, tvb(0, 4))
    item:add(f.wide_version, tvb(4, 1))
    item:add(f.unit_len, tvb(5, 1))
    return spoken
end

-- A failed answer repeats units of the request (§5.6.2).
local function layout_of(opcode, failed)
    return (failed and layouts[requests[opcode]]) or layouts[opcode] or layouts[requests[opcode]]
end

local function dissect_unit(tvb, tree, layout)
    if not layout then
        tree:add(f.data, tvb)
        return
    end
    local words = {}
    for at = 0, 7 do words[at] = tvb(at * 4, 4):uint() end
    local text, wrong = layout[2](words)
    local item = tree:add(f.unit, tvb, text or wrong)
    if wrong then item:add_proto_expert_info(e.unit, wrong) end
    if layout[3] then
        if layout[3] == 4 then item:add(f.authenticate, tvb(0, 4)) end
        item:add(f.first, tvb(layout[3], 8))
        item:add(f.unused, tvb(layout[3] + 8))
        return
    end
    local last = 0
    for at, field in pairs(layout[1]) do
        if field == f.health and words[0] == EXTENSION then field = f.extension end
        item:add(field, tvb((at - 1) * 4, 4))
        last = math.max(last, at)
    end
    if last < 8 then item:add(f.unused, tvb(last * 4)) end
end

-- ---- messages ----

local function summary(tvb)
    local flags, version, opcode = tvb(2, 2):uint(), tvb(4, 1):uint(), tvb(5, 1):uint()
    local text = (opcodes[opcode] or string.format("0x%02x", opcode)) .. " id " .. tvb(6, 2):uint()
    for _, flag in ipairs({ { BASIC, "basic" }, { AUTH, "credential" }, { ERROR, "error" }, { MISMATCH, "version-mismatch" },
        { AUTH_REQUIRED, "auth-required" }, { BAD_SEQUENCE, "bad-sequence" } }) do
        if math.floor(flags / flag[1]) % 2 == 1 then text = text .. " " .. flag[2] end
    end
    local reserved = flags - flags % 0x40
    if reserved ~= 0 then text = text .. string.format(" 0x%04x", reserved) end
    local high, low = tvb(8, 4):uint(), tvb(12, 4):uint()
    if high + low > 0 then text = text .. " seq " .. number(high, low) end
    if version ~= 1 then text = text .. " version " .. version end
    return text
end

-- Seconds as Wireshark's fields take them, to the microsecond.
local function nstime(seconds)
    local micros = math.floor(seconds * 1e6 + 0.5)
    return NSTime.new(math.floor(micros / 1e6), micros % 1e6 * 1000)
end

-- Finds the request of an answer, or notes a request, the first time that a frame is seen.
local function match(pinfo, opcode, id, offset)
    local place = pinfo.number .. "." .. offset
    if not pinfo.visited then
        local stream = tcp_stream()
        local function key(request, from, port)
            return table.concat({ tostring(stream and stream.value), tostring(from), port, id, request }, " ")
        end
        if answers[opcode] then
            local mine = { frame = pinfo.number, time = pinfo.rel_ts }
            local mark = key(opcode, pinfo.src, pinfo.src_port)
            open[mark] = open[mark] or {}
            table.insert(open[mark], mine)
            matched[place] = mine
        elseif requests[opcode] then
            local waiting = open[key(requests[opcode], pinfo.dst, pinfo.dst_port)]
            local request = waiting and table.remove(waiting, 1)
            if request then
                request.answer = pinfo.number
                matched[place] = { request = request.frame, took = pinfo.rel_ts - request.time }
            end
        end
    end
    return matched[place]
end

local function dissect_flags(tvb, tree)
    local item = tree:add(f.flags, tvb)
    for _, field in ipairs({ f.basic, f.auth, f.error, f.mismatch, f.auth_required, f.bad_sequence, f.reserved }) do
        item:add(field, tvb)
    end
end

-- Whose layout wide units have.
local function wide_opcode(opcode, failed)
    return (failed or not wide_layouts[opcode]) and requests[opcode] or opcode
end

local function dissect_payload(tvb, tree, version, opcode, flags)
    local length = tvb:len()
    local authenticated = math.floor(flags / AUTH) % 2 == 1
    local units = authenticated and length >= CREDENTIAL and length - CREDENTIAL or length
    local basic = flags % 2 == 1 and units % UNIT == 0 and version == 1
    if basic then
        local layout = layout_of(opcode, math.floor(flags / ERROR) % 2 == 1)
        for at = 0, units - UNIT, UNIT do dissect_unit(tvb(at, UNIT), tree, layout) end
    elseif flags % 2 == 0 and version == 1 and units > PREAMBLE and (units - PREAMBLE) % WIDE_UNIT == 0
        and wide_layouts[wide_opcode(opcode, math.floor(flags / ERROR) % 2 == 1)] then
        local layout = wide_layouts[wide_opcode(opcode, math.floor(flags / ERROR) % 2 == 1)]
        if dissect_preamble(tvb(0, PREAMBLE), tree) then
            for at = PREAMBLE, units - WIDE_UNIT, WIDE_UNIT do dissect_wide_unit(tvb(at, WIDE_UNIT), tree, layout) end
        else
            tree:add(f.data, tvb(PREAMBLE, units - PREAMBLE))
        end
    elseif units > 0 then
        local item = tree:add(f.data, tvb(0, units))
        if version == 1 then item:add_proto_expert_info(e.payload) end
    end
    if authenticated and length >= CREDENTIAL then
        tree:add(f.credential, tvb(units))
    elseif authenticated then
        tree:add_proto_expert_info(e.payload, "No room for a credential")
    end
end

local function dissect_message(tvb, pinfo, root)
    local flags, version, opcode, id = tvb(2, 2):uint(), tvb(4, 1):uint(), tvb(5, 1):uint(), tvb(6, 2):uint()
    local text = summary(tvb)
    local tree = root:add(necp, tvb(), "NECP, " .. text)
    tree:add(f.summary, tvb(), text):set_generated()
    tree:add(f.identifier, tvb(0, 2))
    dissect_flags(tvb(2, 2), tree)
    local item = tree:add(f.version, tvb(4, 1))
    if version ~= 1 then item:add_proto_expert_info(e.version) end
    item = tree:add(f.opcode, tvb(5, 1))
    if not opcodes[opcode] then item:add_proto_expert_info(e.opcode) end
    tree:add(f.request_id, tvb(6, 2))
    tree:add(f.seq_num, tvb(8, 8))
    tree:add(f.payload_len, tvb(16, 4))
    if math.floor(flags / ERROR) % 2 == 1 then tree:add_proto_expert_info(e.error) end
    local found = match(pinfo, opcode, id, tvb:offset())
    if found and found.answer then tree:add(f.response_in, tvb(), found.answer):set_generated() end
    if found and found.request then
        tree:add(f.response_to, tvb(), found.request):set_generated()
        tree:add(f.time, tvb(), nstime(found.took)):set_generated()
    end
    if tvb:len() > HEADER then dissect_payload(tvb(HEADER):tvb(), tree, version, opcode, flags) end
    return text
end

function necp.dissector(tvb, pinfo, root)
    local at, said = 0, {}
    pinfo.cols.protocol = "NECP"
    while at < tvb:len() do
        local left = tvb:len() - at
        if left >= 2 and tvb(at, 2):uint() ~= 0x414a then
            root:add(necp, tvb(at)):add_proto_expert_info(e.identifier)
            said[#said + 1] = "not NECP"
            at = tvb:len()
            break
        end
        local wanted = left < HEADER and DESEGMENT_ONE_MORE_SEGMENT or HEADER + tvb(at + 16, 4):uint()
        if left < HEADER or left < wanted then
            pinfo.desegment_offset = at
            pinfo.desegment_len = left < HEADER and DESEGMENT_ONE_MORE_SEGMENT or wanted - left
            break
        end
        said[#said + 1] = dissect_message(tvb(at, wanted):tvb(), pinfo, root)
        at = at + wanted
    end
    if #said > 0 then
        pinfo.cols.info:set(table.concat(said, "; "))
    end
    return tvb:len()
end

DissectorTable.get("tcp.port"):add(3262, necp)
